-- Give back a lock that several may hold, or leave the line; others may come in then.
--
-- EVALSHA sha 3 holders line about  token fence entry most  [now]
-- Keys, `most` and `now` as in share_acquire.lua, all other arguments and the reply as in
-- lock_release.lua; an empty token is everybody who holds it.

local call = redis.call

--@ include lock_share

local token, entry = ARGV[1], ARGV[3]
most = tonumber(ARGV[4])
local time = call('TIME')
local now = tonumber(ARGV[5]) or time[1] * 1000000 + time[2]

sweep()
local done = 2
if token == '' then
  done = 0
  for _, other in ipairs(call('ZRANGEBYSCORE', holders, '(0', '+inf')) do
    call('ZADD', holders, string.format('%d', -(now + GONE)), other)
    call('HDEL', about, other)
    done = 1
  end
else
  local own = tonumber(call('ZSCORE', holders, token) or 0)
  if own > 0 then
    done = 1
  elseif own < 0 then
    done = 0
  end
  if ARGV[2] == '0' then -- a copy of its acquire may still be under way
    call('ZADD', holders, string.format('%d', -(now + GONE)), token)
  elseif own > 0 then
    call('ZREM', holders, token)
  end
  call('HDEL', about, token)
end
if entry ~= '' then
  call('ZREM', line, entry)
end
settle(now)
admit(nil, now)
keep(now)
return done
