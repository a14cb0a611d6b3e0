-- Say who holds a lock.
--
-- EVALSHA sha 2 lock line
-- KEYS[1]  lock, KEYS[2]  line: as in lock_acquire.lua
-- Reply: {now, how many wait}, and if somebody holds it: µs until the lease ends, fence, info

local time = redis.call('TIME')
local now = time[1] * 1000000 + time[2]
local reply = {now, redis.call('ZCARD', KEYS[2])}
local ends, fence, info =
  string.match(redis.call('GET', KEYS[1]) or '-', '^[^- ]%S* (%d+) %d+ (%d+) %d+ %d (.*)$')
if ends and tonumber(ends) > now then
  reply[3], reply[4], reply[5] = ends - now, tonumber(fence), info
end
return reply
