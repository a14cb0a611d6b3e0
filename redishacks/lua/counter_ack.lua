-- Drop a batch, all of whose chunks are in the ledger of the database.
--
-- EVALSHA sha n meta batches batch claimed [claimed ...]  id
-- KEYS[1]    meta: hash; remembers when; no TTL
-- KEYS[2]    batches: sorted set of batches in flight; no TTL
-- KEYS[3]    batch: hash of this batch
-- KEYS[4..]  its sorted sets, one per column; UNLINK, since DEL of a million takes 0.5 s
-- ARGV[1]    id of the batch
-- Reply: 1 dropped; 0 another flusher had done it

redis.call('UNLINK', unpack(KEYS, 3))
local now = redis.call('TIME')
redis.call('HSET', KEYS[1], 'flushed', string.format('%d%06d', now[1], now[2]))
return redis.call('ZREM', KEYS[2], ARGV[1])
