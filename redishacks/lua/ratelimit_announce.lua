-- Say which limits a limiter has, for those who look on.
--
-- EVALSHA sha 1 limits  ttl  shape text [shape text ...]
-- KEYS[1]   limits: hash, shape of a limit (as in its keys) -> the limit as JSON; TTL as ARGV[1]
-- ARGV[1]   TTL in seconds
-- ARGV[2..] shapes, each with its limit
-- Reply: 1

redis.call('HSET', KEYS[1], unpack(ARGV, 2))
redis.call('EXPIRE', KEYS[1], ARGV[1])
return 1
