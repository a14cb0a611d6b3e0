-- Take a lock or stand in line for it; just the same: take what was handed over, or look again.
--
-- EVALSHA sha 2 lock line  token ttl not_after ticket entry info barge  [now]
-- KEYS[1]  lock: string "token ends ttl fence lost line info", times in µs; `lost` is the last fence
--          whose holder did not release it, `line` is 1 when somebody may be in line. Nobody has it:
--          "- fence lost line token", with the token that was released last; so is `info` while it
--          was handed over and not taken yet
--          TTL: twice the lease, but two days at least: the fence outlives it by a day
-- KEYS[2]  line: sorted set, see lock_line.lua; TTL: a minute longer than anybody sleeps
-- token    of this acquisition: with the same one all of this may be said again
-- ttl      µs
-- not_after  µs since 1970, nothing is done later than that
-- ticket   '' do not wait, '0' wait, else as it was told at first; '!' only if it is held by this token
-- entry    what to write into the line
-- info     who asks, for people
-- barge    '1': take a free lock whoever else is in line
-- now      µs since 1970, for tests; else the server's own
-- Reply: {1, now, fence}, or just the fence if it is `now`: it is taken
--        {0, now, left, place, ticket, fence, info}  it is not: µs until the lease ends, the place
--                                                  in line from 0 (-1: not in line), the holder
--        {-1, now}  too late      {-2, now}  this token was released before, or has not got it

local call, format, lock, line = redis.call, string.format, KEYS[1], KEYS[2]
local token, ttl, ticket, entry = ARGV[1], tonumber(ARGV[2]), ARGV[4], ARGV[5]
local state = call('GET', lock)
local time = call('TIME')
local now = tonumber(ARGV[8]) or time[1] * 1000000 + time[2]
if now > tonumber(ARGV[3]) then
  return {-1, now}
end

local function hold(who, micros, fence, lost, waiting, info)
  local value = format('%s %d %d %d %s %s %s', who, now + micros, micros, fence, lost, waiting, info)
  call('SET', lock, value, 'PX', micros < 86400000000 and '172800000' or format('%d', micros / 500))
end

local slipped -- who was handed it and did not take it
local holder, left, length, fence, lost, waiting, info = nil, 0, 0, 0, '0', '0', ''
if state and string.byte(state) == 45 then
  fence, lost, waiting, info = string.match(state, '^- (%d+) (%d+) (%d) (.*)$')
elseif state then
  holder, left, length, fence, lost, waiting, info =
    string.match(state, '^(%S+) (%d+) (%d+) (%d+) (%d+) (%d) (.*)$')
end
if not waiting then
  return redis.error_reply('ERR this key is no lock')
end
if holder then
  left = left - now
  if holder == token then
    if ticket ~= '!' and left <= tonumber(length) then
      ttl = math.max(ttl, left) -- a copy that comes late cuts nothing short
    end
    if ttl >= left or waiting == '0' then
      hold(token, ttl, fence, lost, waiting, ARGV[6])
      return {1, now, tonumber(fence)}
    end
  elseif left <= 0 then
    slipped = not string.find(info, '\t', 1, true) and holder
    holder, lost = nil, fence
  end
end

if info == token or ticket == '!' and holder ~= token then
  return {-2, now}
end
if not holder then
  fence = fence + 1
  fence = now > fence and now or fence
  if waiting == '0' or ARGV[7] == '1' then
    if ticket ~= '' then
      call('ZREM', line, entry)
    end
    hold(token, ttl, fence, lost, waiting, ARGV[6])
    return fence == now and now or {1, now, fence}
  end
end

--@ include lock_line

if ticket ~= '' or not holder or holder == token then
  call('ZCARD', line) -- fails now, not half-way, when the key is something else
end
if holder == token then -- for less time than those in line have been told
  hold(token, ttl, fence, lost, waiting, ARGV[6])
  warn_others(line, nil, ttl)
  return {1, now, tonumber(fence)}
end
if not holder then
  local gone = slipped and process(slipped)
  local who, mode, first = first_in(line, token, gone ~= process(token) and gone)
  if not who or who == token or mode == 'u' then
    hold(token, ttl, fence, lost, who and '1' or '0', ARGV[6])
    call('ZREM', line, entry)
    return {1, now, fence}
  end
  info = string.find(info, '\t', 1, true) and '' or info -- who released it may yet ask once more
  hold(who, CLAIM, fence, lost, '1', info)
  warn_others(line, first, CLAIM)
  holder, left, waiting = who, CLAIM, '1'
elseif left > tonumber(length) then -- the clock was set back: no lease is longer than it is long
  left = tonumber(length)
  hold(holder, left, fence, lost, waiting, info)
end

local place = -1
if ticket ~= '' then
  if ticket == '0' then
    local last = call('ZRANGE', line, -1, -1, 'WITHSCORES')[2] or 0
    ticket = format('%d', math.max(now, last + 1))
  end
  if waiting == '0' then
    hold(holder, left, fence, lost, '1', info)
  end
  call('ZADD', line, 'NX', ticket, entry)
  place = call('ZRANK', line, entry)
  local keep = math.ceil(left / 1000) + 60000
  if call('PTTL', line) < keep then
    call('PEXPIRE', line, keep)
  end
end
return {0, now, tonumber(left), place, ticket, tonumber(fence), info}
