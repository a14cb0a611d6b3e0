-- Take a lock that several may hold, or stand in line for it; just the same: take what was handed
-- over, or look again.
--
-- EVALSHA sha 3 holders line about  token ttl not_after ticket entry info most  [now]
-- KEYS[1]  holders: sorted set as in holders.lua; TTL until the last lease has ended
-- KEYS[2]  line: sorted set as in lock_line.lua; TTL: a minute longer than anybody sleeps
-- KEYS[3]  about: hash as in lock_share.lua; TTL: two days, or twice the lease
-- most     how many may hold it at once, 0 for any number
-- All other arguments, and the reply, are those of lock_acquire.lua.

local call = redis.call

--@ include lock_share

local token, ttl, ticket, entry, info = ARGV[1], tonumber(ARGV[2]), ARGV[4], ARGV[5], ARGV[6]
most = tonumber(ARGV[7])
local time = call('TIME')
local now = tonumber(ARGV[8]) or time[1] * 1000000 + time[2]
if now > tonumber(ARGV[3]) then
  return {-1, now}
end

local own = tonumber(call('ZSCORE', holders, token) or 0)
if own < 0 then
  return {-2, now}
end
local taken = own > 0
if taken and ticket ~= '!' then
  local length = string.match(call('HGET', about, token) or '', '^%d+ (%d+)')
  if length and own - now <= tonumber(length) then
    ttl = math.max(ttl, own - now) -- a copy that comes late cuts nothing short
  end
end
if taken and now + ttl < own then -- for less time than those in line have been told
  warn_others(line, nil, ttl)
end
if not taken then
  if ticket == '!' then
    return {-2, now}
  end
  sweep()
  settle(now)
  if ticket ~= '' then
    if ticket == '0' then
      local early, last = 0, call('ZRANGE', line, -1, -1, 'WITHSCORES')[2]
      if string.byte(token) == 119 then
        early = 4503599627370496
        last = call('ZREVRANGEBYSCORE', line, '(0', '-inf', 'WITHSCORES', 'LIMIT', 0, 1)[2]
      end
      ticket = string.format('%d', math.max(now - early, (last or -early) + 1))
    end
    call('ZADD', line, 'NX', ticket, entry)
    taken = admit(token, now)
  else
    taken = admit(token, now) or call('EXISTS', line) == 0 and room(token, now)
  end
end
if taken then
  local fence = hold(token, ttl, now, info)
  keep(now)
  return {1, now, fence}
end

local held = count(holders, now)
local left = ends(holders, now, string.byte(token) == 119 and held - 1 or 0)
local fence, about_holder = 0, ''
if held == 1 then
  local holder = call('ZRANGEBYSCORE', holders, after(now), '+inf', 'LIMIT', 0, 1)[1]
  fence, about_holder = string.match(call('HGET', about, holder) or '0 0 ', '^(%d+) %d+ (.*)$')
end
local place = -1
if ticket ~= '' then
  call('ZADD', line, 'NX', ticket, entry) -- it may have been taken for gone
  place = call('ZRANK', line, entry)
  local longest = math.ceil(left / 1000) + 60000
  if call('PTTL', line) < longest then
    call('PEXPIRE', line, longest)
  end
end
keep(now)
return {0, now, left, place, ticket, tonumber(fence), about_holder}
