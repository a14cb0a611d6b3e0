-- At most so many at once: who holds a place, and until when.
--
-- EVALSHA sha 1 slots  verb token lease most  [now]
-- KEYS[1]  slots: sorted set as in holders.lua; TTL until the last lease has ended
-- verb     enter    take a place unless `most` are taken; for a token that has one: all is well
--          renew    begin the lease anew; one that has ended stays lost
--          leave    give the place back
--          abandon  the same, and refuse this token for the time of a lease: a copy of its `enter`
--                   may still be under way
--          peek     look
--          list     say who holds a place
-- token    length of its lease in µs, '-', random text; '' for peek and list
-- lease    µs
-- most     places
-- now      µs since 1970, for tests; else the server's own
-- Reply: {now, 1 or 0, holders, retry, next, reset}; 1: the token has a place now, or left one;
--        retry: µs until a place is free if all stay to the end of their leases, 0: now, -1: never;
--        next: until the first lease ends; reset: until the last one does.
--        list: {token, µs until its lease ends, ...}, the first to end first

local key, verb, token = KEYS[1], ARGV[1], ARGV[2]
local lease, most, now = tonumber(ARGV[3]), tonumber(ARGV[4]), tonumber(ARGV[5])
if not now then
  local time = redis.call('TIME')
  now = time[1] * 1000000 + time[2]
end

--@ include holders

-- After a step of the clock back leases end too late: none may last longer than it is long.
local function shorten()
  for _, other in ipairs(redis.call('ZRANGEBYSCORE', key, after(now + lease), '+inf')) do
    local whole = tonumber(string.match(other, '^%d+'))
    if whole then
      redis.call('ZADD', key, 'XX', 'LT', now + whole, other)
    end
  end
end

if verb == 'list' then
  local reply = redis.call('ZRANGEBYSCORE', key, after(now), '+inf', 'WITHSCORES')
  for i = 2, #reply, 2 do
    reply[i] = reply[i] - now
  end
  return reply
end

local own = tonumber(redis.call('ZSCORE', key, token) or 0)
local done = 0
if verb == 'enter' then
  redis.call('ZREMRANGEBYSCORE', key, string.format('%.0f', -now), string.format('%.0f', now))
  shorten()
  if own > now or own >= -now and count(key, now) < most then
    redis.call('ZADD', key, now + lease, token)
    done = 1
  end
elseif verb == 'renew' and own > now then
  redis.call('ZADD', key, now + lease, token)
  done = 1
elseif verb == 'leave' then
  done = redis.call('ZREM', key, token)
elseif verb == 'abandon' then
  redis.call('ZADD', key, -(now + lease), token)
  done = own > now and 1 or 0
end
if verb ~= 'peek' and (done == 1 or verb == 'abandon' or redis.call('PTTL', key) == -1) then
  expire(key, now)
end

local holders = count(key, now)
local retry = 0
if most == 0 then
  retry = -1
elseif holders >= most then
  retry = ends(key, now, holders - most)
end
return {now, done, holders, retry, ends(key, now, 0), ends(key, now, math.max(0, holders - 1))}
