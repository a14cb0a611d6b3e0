-- Begin the leases of locks anew, none to end sooner than before (this may come late): nobody in line is told.
--
-- EVALSHA sha n lock ...  token ttl ...
-- KEYS[i]  lock: as in lock_acquire.lua
-- token    of the acquisition that holds it; ttl: µs from now
-- Reply: {i, ...}: which of them, from 1, are held by it no longer

local call, sub, match, format = redis.call, string.sub, string.match, string.format
local time = call('TIME')
local now = time[1] * 1000000 + time[2]
local gone = {}
for i, lock in ipairs(KEYS) do
  local token, ttl = ARGV[2 * i - 1], tonumber(ARGV[2 * i])
  local state = redis.pcall('GET', lock) -- what is no lock is an error for this one alone
  if type(state) == 'string' and sub(state, 1, #token + 1) == token .. ' ' then
    local ends, length, rest = match(state, '^%S+ (%d+) (%d+) (.*)$')
    local left = ends - now
    if left < ttl or left > tonumber(length) then -- longer than it is long: the clock was set back
      local value = format('%s %d %d %s', token, now + ttl, ttl, rest)
      call('SET', lock, value, 'PX', ttl < 86400000000 and '172800000' or format('%d', ttl / 500))
    end
  else
    gone[#gone + 1] = i
  end
end
return gone
