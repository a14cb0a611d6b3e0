-- Write something into a batch, for a WAIT that follows on the same connection.
--
-- EVALSHA sha 1 batch
-- KEYS[1]  batch: hash of a batch in flight; no TTL
-- Reply: 1

-- First what a full server allows too: the rest of a script that has begun to write goes through.
redis.call('HDEL', KEYS[1], 'confirmed')
redis.call('HSET', KEYS[1], 'confirmed', 1)
return 1
