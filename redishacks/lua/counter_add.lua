-- Add amounts to the pending sets of one partition: all of them, or none.
--
-- EVALSHA sha n since column [column ...] [fence]  sequence rules  id value... [id value... ...]
-- KEYS[1]    since: string, µs of the oldest hit not yet claimed; no TTL, the claim takes it
-- KEYS[2..]  one sorted set per column, id -> amount; no TTL, a count must not expire before it
--            is in SQL. The first one holds every id, with a neutral amount if it has none
-- KEYS[last] when sequence is not '': the producer's fence: string, last sequence seen; TTL 24 h
-- ARGV[1]    sequence: '' or a number that grows with every send of this producer
-- ARGV[2]    rules: a letter per column: + sum, > max, < min
-- ARGV[3..]  each id once, followed by a value per column, '' for none
-- Reply: 1 applied; 0 this sequence was applied before; -n the sum of the n-th id would pass 2^53
--        and nothing was applied

local EXACT = 9007199254740992
local FENCE_TTL = 86400
local NEUTRAL = {['+'] = '0', ['>'] = '-inf', ['<'] = '+inf'}

local fenced = ARGV[1] ~= ''
local columns = #KEYS - 1
if fenced then
  columns = columns - 1
  local last = redis.call('GET', KEYS[#KEYS])
  if last and tonumber(ARGV[1]) <= tonumber(last) then
    return 0
  end
end

-- Every check comes before the first write: scripts do not roll back.
local rules = {}
local width = columns + 1
for c = 1, columns do
  local key = KEYS[c + 1]
  rules[c] = string.sub(ARGV[2], c, c)
  if rules[c] ~= '+' then
    redis.call('ZCARD', key) -- raises WRONGTYPE
  else
    for i = 3, #ARGV, width do
      if ARGV[i + c] ~= '' then
        local old = redis.call('ZSCORE', key, ARGV[i])
        if old then
          local score, amount = tonumber(old), tonumber(ARGV[i + c])
          if (amount > 0 and score > EXACT - amount) or (amount < 0 and score < -EXACT - amount) then
            return -((i - 3) / width + 1)
          end
        end
      end
    end
  end
end

for c = 1, columns do
  local key, rule = KEYS[c + 1], rules[c]
  for i = 3, #ARGV, width do
    local id, amount = ARGV[i], ARGV[i + c]
    if amount == '' then
      if c == 1 then
        redis.call('ZADD', key, 'NX', NEUTRAL[rule], id)
      end
    elseif rule == '+' then
      redis.call('ZINCRBY', key, amount, id)
    else
      redis.call('ZADD', key, rule == '>' and 'GT' or 'LT', amount, id)
    end
  end
end
if redis.call('EXISTS', KEYS[1]) == 0 then
  local now = redis.call('TIME')
  redis.call('SET', KEYS[1], string.format('%d%06d', now[1], now[2]))
end
if fenced then
  redis.call('SET', KEYS[#KEYS], ARGV[1], 'EX', FENCE_TTL)
end
return 1
