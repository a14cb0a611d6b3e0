-- Take several locks, all or none; nobody waits.
--
-- EVALSHA sha 2n lock line ...  ttl not_after info barge token ...  [now]
-- KEYS[2i - 1] lock, KEYS[2i] line: as in lock_acquire.lua
-- token    of the acquisition of each lock; all else as in lock_acquire.lua
-- Reply: {1, now, fence, ...}                 they are taken
--        {0, now, i, left, fence, info}       lock i, from 1, is not free: about who has it
--        {-1, now} too late    {-2, now} one of the tokens was released before

local call, format, match = redis.call, string.format, string.match
local locks = #KEYS / 2
local ttl, info, barge = tonumber(ARGV[1]), ARGV[3], ARGV[4]
local time = call('TIME')
local now = tonumber(ARGV[5 + locks]) or time[1] * 1000000 + time[2]
if now > tonumber(ARGV[2]) then
  return {-1, now}
end

--@ include lock_line

local function write(lock, who, micros, fence, lost, waiting, about)
  local value = format('%s %d %d %d %s %s %s', who, now + micros, micros, fence, lost, waiting, about)
  call('SET', lock, value, 'PX', micros < 86400000000 and '172800000' or format('%d', micros / 500))
end

local taken = {1, now}
local writes = {}
for i = 1, locks do
  local lock, line, token = KEYS[2 * i - 1], KEYS[2 * i], ARGV[4 + i]
  local state = call('GET', lock)
  local holder, ends, length, fence, lost, waiting, about = '-', now, 0, 0, '0', '0', ''
  if state and string.byte(state) == 45 then
    fence, lost, waiting, about = match(state, '^- (%d+) (%d+) (%d) (.*)$')
  elseif state then
    holder, ends, length, fence, lost, waiting, about =
      match(state, '^(%S+) (%d+) (%d+) (%d+) (%d+) (%d) (.*)$')
    if waiting and ends - now > tonumber(length) then -- the clock was set back
      ends = now + length
      write(lock, holder, tonumber(length), fence, lost, waiting, about)
    end
  end
  if not waiting then
    return redis.error_reply('ERR this key is no lock')
  end
  if about == token then
    return {-2, now}
  end
  if holder ~= token then
    if ends - now > 0 then
      return {0, now, i, ends - now, tonumber(fence), about}
    end
    local gone = nil
    local note = string.find(about, '\t', 1, true) and '' or about
    if holder ~= '-' then
      lost = fence
      gone = note == about and process(holder)
    end
    fence = math.max(now, fence + 1)
    if waiting == '1' and barge == '0' then
      local who, mode, first = first_in(line, nil, gone ~= process(token) and gone)
      if who and mode == 'f' then
        write(lock, who, CLAIM, fence, lost, '1', note)
        warn_others(line, first, CLAIM)
        return {0, now, i, CLAIM, fence, note}
      end
      waiting = who and '1' or '0'
    end
  end
  writes[i] = {lock, token, ttl, tonumber(fence), lost, waiting, info}
  taken[2 + i] = tonumber(fence)
end
for i = 1, locks do
  write(unpack(writes[i]))
end
return taken
