-- Begin the leases of locks anew that several may hold, none to end sooner than before.
--
-- EVALSHA sha n holders ...  token ttl ...
-- KEYS[i]  holders: as in share_acquire.lua
-- All else as in lock_extend.lua.

local call = redis.call

--@ include holders

local time = call('TIME')
local now = time[1] * 1000000 + time[2]
local gone = {}
for i, key in ipairs(KEYS) do
  local token, ttl = ARGV[2 * i - 1], tonumber(ARGV[2 * i])
  if tonumber(call('ZSCORE', key, token) or 0) > 0 then
    call('ZADD', key, 'GT', string.format('%d', now + ttl), token)
    expire(key, now)
  else
    gone[#gone + 1] = i
  end
end
return gone
