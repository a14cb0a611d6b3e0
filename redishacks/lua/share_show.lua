-- Say who holds a lock that several may hold.
--
-- EVALSHA sha 3 holders line about
-- Keys as in share_acquire.lua; reply as of lock_show.lua, with as many holders as there are.

local call = redis.call

--@ include holders

local time = call('TIME')
local now = time[1] * 1000000 + time[2]
local reply = {now, call('ZCARD', KEYS[2])}
local found = call('ZRANGEBYSCORE', KEYS[1], after(now), '+inf', 'WITHSCORES')
for i = 1, #found, 2 do
  local fence, info = string.match(call('HGET', KEYS[3], found[i]) or '0 0 ', '^(%d+) %d+ (.*)$')
  reply[#reply + 1] = found[i + 1] - now
  reply[#reply + 1] = tonumber(fence)
  reply[#reply + 1] = info
end
return reply
