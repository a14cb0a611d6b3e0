-- Say which limits a limiter has, for those who look on; forget those that nobody has any more.
--
-- EVALSHA sha 1 limits  now ttl  field text [field text ...]
-- KEYS[1]   limits: hash, shape and name of a limit -> when it was announced, a space, the limit
--           as JSON; TTL as ARGV[2]
-- ARGV[1]   now in seconds
-- ARGV[2]   TTL in seconds
-- ARGV[3..] limits
-- Reply: 1

local all = redis.call('HGETALL', KEYS[1])
for i = 1, #all, 2 do
  local announced = tonumber(string.match(all[i + 1], '^%d+'))
  if not announced or announced < ARGV[1] - ARGV[2] then
    redis.call('HDEL', KEYS[1], all[i])
  end
end
for i = 3, #ARGV, 2 do
  redis.call('HSET', KEYS[1], ARGV[i], ARGV[1] .. ' ' .. ARGV[i + 1])
end
redis.call('EXPIRE', KEYS[1], ARGV[2])
return 1
