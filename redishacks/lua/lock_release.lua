-- Give a lock to the next in line, or to nobody; whoever does not hold it leaves the line.
--
-- EVALSHA sha 2 lock line  token fence entry  [now]
-- KEYS[1]  lock, KEYS[2]  line: as in lock_acquire.lua
-- token    of the acquisition; '' for whoever holds it, who then has lost it
-- fence    that it got, '0' when it does not know of any
-- entry    what it wrote into the line, '' when it did not
-- now      µs since 1970, for tests; else the server's own
-- Reply: 1 it was held, and is no longer
--        2 it is not held, and this fence was not lost as far as is known: it was released before
--        3 it is not held, and a later one was lost since: nobody knows any more
--        0 it was lost, or nobody knows of the lock

local call, format, lock, line = redis.call, string.format, KEYS[1], KEYS[2]
local token, mine = ARGV[1], ARGV[2]
local state = call('GET', lock)
local free = not state or string.byte(state) == 45

local function set_free(fence, lost, waiting)
  call('SET', lock, format('- %s %s %s %s', fence, lost, waiting, token), 'PX', '86400000')
end

local holder, ends, fence, lost, waiting
if free then
  fence, lost, waiting = string.match(state or '- 0 0 0', '^- (%d+) (%d+) (%d)')
else
  holder, ends, fence, lost, waiting = string.match(state, '^(%S+) (%d+) %d+ (%d+) (%d+) (%d)')
end
if not waiting then
  return redis.error_reply('ERR this key is no lock')
end
if not free then
  if token == '' then
    token, lost = holder, fence
  end
  if holder == token and waiting == '0' then
    set_free(fence, lost, '0')
    return 1
  end
end

--@ include lock_line

local time = call('TIME')
local now = tonumber(ARGV[4]) or time[1] * 1000000 + time[2]

if holder == token then
  -- Before the next one is told: what is published last goes out first.
  local next_one = call('ZRANGE', line, 0, 0)[1]
  warn_others(line, next_one, CLAIM)
  local who, mode, first = first_in(line)
  if first ~= next_one then
    warn_others(line, first, CLAIM)
  end
  if who and mode == 'f' then
    fence = math.max(now, fence + 1)
    call('SET', lock, format('%s %d %d %d %s 1 %s', who, now + CLAIM, CLAIM, fence, lost,
      token), 'PX', '172800000')
  else
    set_free(fence, lost, who and '1' or '0')
  end
  return 1
end

if ARGV[3] ~= '' then
  local was_first = call('ZRANGE', line, 0, 0)[1] == ARGV[3]
  call('ZREM', line, ARGV[3])
  if was_first then
    warn_others(line, nil, math.max(0, (ends or now) - now))
  end
end
if free and mine == '0' and token ~= '' then
  set_free(fence, lost, waiting) -- a copy of its acquire may still be under way
end
if not state or token == '' or mine == lost then
  return 0
end
return tonumber(mine) > tonumber(lost) and 2 or 3
