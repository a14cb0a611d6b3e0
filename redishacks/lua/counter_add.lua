-- Add amounts to the pending sets of one partition: all of them, or none.
--
-- EVALSHA sha n since column [column ...] [fence]  sequence rules  id [id ...]  value [value ...] ...
-- KEYS[1]    since: string, µs of the oldest hit not yet claimed; no TTL, the claim takes it
-- KEYS[2..]  one sorted set per column, id -> amount; no TTL, a count must not expire before it
--            is in SQL. The first one holds every id, with a neutral amount if it has none
-- KEYS[last] when sequence is not '': the producer's fence: string, last sequence seen; TTL 24 h
-- ARGV[1]    sequence: '' or a number that grows with every send of this producer
-- ARGV[2]    rules: a letter per column: + sum, > max, < min
-- ARGV[3..]  n ids, each once; then for every column n values, '' for none
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
local n = (#ARGV - 2) / (columns + 1)

-- Whether a number was rounded on its way, or has room for it no more.
local function exceeds(text, amount, old)
  return (amount > 0 and old > EXACT - amount) or (amount < 0 and old < -EXACT - amount)
    or (amount >= EXACT and text ~= LIMIT)
    or (amount <= -EXACT and text ~= '-' .. LIMIT)
end

-- What is to be written: per column, score and member for ZADD. One ZMSCORE and one ZADD for all
-- ids cost a fraction of a ZINCRBY for each; nothing comes between them.
local writes = {}
-- Every check comes before the first write: scripts do not roll back.
for c = 1, columns do
  local key, rule = KEYS[c + 1], string.sub(ARGV[2], c, c)
  local neutral = c == 1 and NEUTRAL[rule]
  local values, write, last = 2 + c * n, {}, 0
  if rule == '+' then
    for from = 1, n, SLICE do
      local to = math.min(from + SLICE - 1, n)
      local scores = redis.call('ZMSCORE', key, unpack(ARGV, 2 + from, 2 + to))
      for at = from, to do
        local score, old = ARGV[values + at], scores[at - from + 1]
        if score == '' then
          score = not old and neutral
        else
          local amount = tonumber(score)
          local sum = old and old + amount or amount
          if (sum >= EXACT or sum <= -EXACT or amount >= EXACT or amount <= -EXACT)
            and exceeds(score, amount, tonumber(old or 0)) then
            return -at
          end
          if old then
            score = sum -- goes out with 17 digits, so exactly
          end
        end
        if score then
          write[last + 1], write[last + 2] = score, ARGV[2 + at]
          last = last + 2
        end
      end
    end
  else
    redis.call('ZCARD', key) -- raises WRONGTYPE
    for at = 1, n do
      local score = ARGV[values + at]
      if score == '' then
        score = neutral -- GT and LT set it where there is none
      end
      if score then
        write[last + 1], write[last + 2] = score, ARGV[2 + at]
        last = last + 2
      end
    end
  end
  writes[c] = write
end

local FLAG = {['>'] = 'GT', ['<'] = 'LT'}
for c, write in ipairs(writes) do
  local flag = FLAG[string.sub(ARGV[2], c, c)] or 'CH' -- CH: only what it replies differs
  for from = 1, #write, SLICE do
    redis.call('ZADD', KEYS[c + 1], flag, unpack(write, from, math.min(from + SLICE - 1, #write)))
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
