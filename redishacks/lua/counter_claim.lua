-- Claim everything pending in one partition as a batch that never changes again.
--
-- EVALSHA sha n meta since next batches batch pending... claimed...
--         expected following chunk destination ledger column [column ...]
-- KEYS[1]    meta: hash; no TTL
-- KEYS[2]    since: string, µs of the oldest hit; removed, its value goes with the batch
-- KEYS[3]    next: string, the id this batch gets; replaced by the following one
-- KEYS[4]    batches: sorted set of batches in flight -> µs of the claim; no TTL
-- KEYS[5]    batch: hash of this batch: size, chunk, since, columns, and where it goes: destination,
--            ledger; no TTL, dropped when acknowledged
-- KEYS[6..]  the pending sorted set of each column, then the claimed one of each: no TTL.
--            RENAME takes microseconds at any size
-- ARGV[1]    the value of next for which the keys were made
-- ARGV[2]    the value of next to follow
-- ARGV[3]    ids per chunk, fixed for the life of the batch
-- ARGV[4]    where the caller flushes to
-- ARGV[5]    which ledger is there
-- ARGV[6..]  names of the columns
-- Reply: number of ids claimed; 0 nothing was pending; -1 next has changed, look again; -2 the
--        counter flushes to another destination or ledger, or to none any more;
--        or the name of a column that the counter has and the caller does not know

if redis.call('GET', KEYS[3]) ~= ARGV[1] then
  return -1
end
if redis.call('HGET', KEYS[1], 'destination') ~= ARGV[4]
  or redis.call('HGET', KEYS[1], 'ledger') ~= ARGV[5] then
  return -2
end
local known = {}
local columns = #ARGV - 5
for c = 1, columns do
  known['column ' .. ARGV[c + 5]] = true
end
for _, field in ipairs(redis.call('HKEYS', KEYS[1])) do
  if string.sub(field, 1, 7) == 'column ' and not known[field] then
    return string.sub(field, 8)
  end
end
local size = redis.call('ZCARD', KEYS[6])
if size == 0 then
  return 0
end

local now = redis.call('TIME')
now = string.format('%d%06d', now[1], now[2])
local since = redis.call('GET', KEYS[2]) or now
-- First what a full server allows too: the rest of a script that has begun to write goes through,
-- and it is the flush that frees memory.
redis.call('DEL', KEYS[2])
redis.call('HSET', KEYS[5], 'size', size, 'chunk', ARGV[3], 'since', since,
  'columns', table.concat(ARGV, '\n', 6), 'destination', ARGV[4], 'ledger', ARGV[5])
redis.call('ZADD', KEYS[4], now, ARGV[1])
redis.call('SET', KEYS[3], ARGV[2])
for c = 1, columns do
  if redis.call('EXISTS', KEYS[5 + c]) == 1 then
    redis.call('RENAME', KEYS[5 + c], KEYS[5 + columns + c])
  end
end
return size
