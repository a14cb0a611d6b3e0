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

local EXACT, LIMIT = 9007199254740992, '9007199254740992'
local FENCE_TTL = 86400
local NEUTRAL = {['+'] = '0', ['>'] = '-inf', ['<'] = '+inf'}
local SLICE = 2000 -- what unpack() can bear

local fenced = ARGV[1] ~= ''
local columns = #KEYS - 1
if fenced then
  columns = columns - 1
  local last = redis.call('GET', KEYS[#KEYS])
  if last and tonumber(ARGV[1]) <= tonumber(last) then
    return 0
  end
end
local width = columns + 1

-- What is to be written: per column the arguments of ZADD. One ZMSCORE and one ZADD for all ids
-- cost a fraction of a ZINCRBY for each; nothing comes between them.
local writes, bare = {}, {}
-- Every check comes before the first write: scripts do not roll back.
for c = 1, columns do
  local key, rule = KEYS[c + 1], string.sub(ARGV[2], c, c)
  local ids, amounts, without, n = {}, {}, {}, 0
  for i = 3, #ARGV, width do
    if ARGV[i + c] ~= '' then
      n = n + 1
      ids[n], amounts[n] = ARGV[i], ARGV[i + c]
    elseif c == 1 then
      without[#without + 1] = NEUTRAL[rule]
      without[#without + 1] = ARGV[i]
    end
  end
  local pairs_of = {}
  if n == 0 then
    redis.call('ZCARD', key) -- raises WRONGTYPE
  elseif rule == '+' then
    for from = 1, n, SLICE do
      local to = math.min(from + SLICE - 1, n)
      local scores = redis.call('ZMSCORE', key, unpack(ids, from, to))
      for at = from, to do
        local amount = tonumber(amounts[at])
        local old = tonumber(scores[at - from + 1] or 0)
        if (amount > 0 and old > EXACT - amount) or (amount < 0 and old < -EXACT - amount)
          or (amount == EXACT and amounts[at] ~= LIMIT) -- 2^53 + 1, rounded
          or (amount == -EXACT and amounts[at] ~= '-' .. LIMIT) then
          for i = 3, #ARGV, width do
            if ARGV[i] == ids[at] then
              return -((i - 3) / width + 1)
            end
          end
        end
        pairs_of[2 * at - 1] = old + amount -- goes out with 17 digits, so exactly
        pairs_of[2 * at] = ids[at]
      end
    end
  else
    redis.call('ZCARD', key)
    for at = 1, n do
      pairs_of[2 * at - 1] = amounts[at]
      pairs_of[2 * at] = ids[at]
    end
  end
  writes[c], bare[c] = {rule = rule, arguments = pairs_of}, without
end

local function zadd(key, flag, arguments)
  for from = 1, #arguments, SLICE do
    local to = math.min(from + SLICE - 1, #arguments)
    if flag then
      redis.call('ZADD', key, flag, unpack(arguments, from, to))
    else
      redis.call('ZADD', key, unpack(arguments, from, to))
    end
  end
end

local FLAG = {['>'] = 'GT', ['<'] = 'LT'}
for c = 1, columns do
  zadd(KEYS[c + 1], 'NX', bare[c])
  zadd(KEYS[c + 1], FLAG[writes[c].rule], writes[c].arguments)
end
if redis.call('EXISTS', KEYS[1]) == 0 then
  local now = redis.call('TIME')
  redis.call('SET', KEYS[1], string.format('%d%06d', now[1], now[2]))
end
if fenced then
  redis.call('SET', KEYS[#KEYS], ARGV[1], 'EX', FENCE_TTL)
end
return 1
