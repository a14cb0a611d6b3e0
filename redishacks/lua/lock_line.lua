-- Included by scripts about locks: who waits in line, and how they are told. Not a script by itself.
--
-- A line is a sorted set: entry -> ticket, which is µs since 1970 when it began to wait.
-- An entry is "token mode kind channel", without blanks between mode, kind and channel:
--   mode  f  the lock is handed over to it    u  it is told that the lock is free, and may lose it
--   kind  p  told by PUBLISH    s  by SPUBLISH    -  nobody can tell it: it looks every so often
-- What is told is "token µs": something happened (0), or look again in so many µs.

local CLAIM = 200000 -- µs that a lock is kept for somebody it was handed over to

local function tell(entry, micros) -- whether anybody listens
  local token, kind, channel = string.match(entry, '^(%S+) .(.)(.*)$')
  if kind == '-' then
    return true
  end
  local verb = kind == 's' and 'SPUBLISH' or 'PUBLISH'
  return call(verb, channel, string.format('%s %d', token, micros)) > 0
end

local function process(token) -- that it is of: after a mark of some kinds, its first 12 characters
  return string.match(token, '^[rw]?(' .. string.rep('.?', 12) .. ')')
end

-- The first in line who is there, and its mode; one to whom a lock is handed over leaves the line.
-- So do those of a process that is `gone`: it did not take what it was handed. They are told, and
-- when they look again their tickets give them back their places.
local function first_in(line, own, gone)
  while true do
    local entry = call('ZRANGE', line, 0, 0)[1]
    if not entry then
      return nil
    end
    local token, mode = string.match(entry, '^(%S+) (.)')
    if token == own or tell(entry, 0) and not (gone and gone == process(token)) then
      if mode == 'f' or token == own then
        call('ZREM', line, entry)
      end
      return token, mode, entry
    end
    call('ZREM', line, entry)
  end
end

-- Have two of those in line look again, for whoever has it may be unable to go on: the next one and,
-- since that may be so too, the last; one of the same process only if there is no other.
local function warn_others(line, before, micros)
  local same, told, other = before and string.match(before, '^%S+ .(.*)$'), nil, nil
  for _, range in ipairs({'ZRANGE', 'ZREVRANGE'}) do
    local place = 0
    for _ = 1, 8 do -- one by one: mostly it is the first or the second
      local entry = call(range, line, place, place)[1]
      local ear = entry and string.match(entry, '^%S+ .(.*)$')
      if not entry or ear == told then
        break
      elseif ear == same then
        place = place + 1
        other = entry ~= before and (other or entry) or other
      elseif tell(entry, micros) then
        told = ear
        break
      else
        call('ZREM', line, entry)
      end
    end
  end
  if other and not told then
    tell(other, micros)
  end
end
