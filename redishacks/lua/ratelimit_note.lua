-- Take note of refusals that were answered elsewhere, for those who look on.
--
-- EVALSHA sha 1 refused  most ttl  key count [key count ...]
-- KEYS[1]   refused: sorted set, key -> how often it was refused in this hour; TTL 25 hours
-- ARGV[1]   keys to remember: those refused most
-- ARGV[2]   TTL in seconds
-- ARGV[3..] keys, each with a count
-- Reply: 1

for i = 3, #ARGV, 2 do
  redis.call('ZINCRBY', KEYS[1], ARGV[i + 1], ARGV[i])
end
redis.call('ZREMRANGEBYRANK', KEYS[1], 0, -1 - ARGV[1])
redis.call('EXPIRE', KEYS[1], ARGV[2])
return 1
