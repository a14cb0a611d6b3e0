-- Say that a process hits here, and count those that said so lately.
--
-- EVALSHA sha 1 processes  process ttl  [now]
-- KEYS[1]  processes: sorted set, process -> µs of its last heartbeat; TTL as ARGV[2]
-- ARGV[1]  the process
-- ARGV[2]  ms after which it is no longer counted
-- ARGV[3]  µs since 1970, for tests; else the server's own
-- Reply: number of processes

local now = tonumber(ARGV[3])
if not now then
  local time = redis.call('TIME')
  now = time[1] * 1000000 + time[2]
end
redis.call('ZADD', KEYS[1], now, ARGV[1])
redis.call('ZREMRANGEBYSCORE', KEYS[1], '-inf', now - ARGV[2] * 1000)
redis.call('PEXPIRE', KEYS[1], ARGV[2])
return redis.call('ZCARD', KEYS[1])
