-- Add to one id of a counter whose only column is a sum: the short way of counter_add.
--
-- EVALSHA sha 2 since column  id amount
-- KEYS[1]  since: string, µs of the oldest hit not yet claimed; no TTL, the claim takes it
-- KEYS[2]  sorted set, id -> amount; no TTL, a count must not expire before it is in SQL
-- Reply: 1 applied; -1 the sum would pass 2^53 and nothing was applied

local EXACT = 9007199254740992

local old = redis.call('ZSCORE', KEYS[2], ARGV[1])
if old then
  local score, amount = tonumber(old), tonumber(ARGV[2])
  if (amount > 0 and score > EXACT - amount) or (amount < 0 and score < -EXACT - amount) then
    return -1
  end
end
redis.call('ZINCRBY', KEYS[2], ARGV[2], ARGV[1])
-- A pending set that has an id already has its time, too.
if not old and redis.call('EXISTS', KEYS[1]) == 0 then
  local now = redis.call('TIME')
  redis.call('SET', KEYS[1], string.format('%d%06d', now[1], now[2]))
end
return 1
