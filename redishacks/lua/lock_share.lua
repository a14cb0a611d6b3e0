-- Included by scripts about locks that several may hold. Not a script by itself.
--
-- A token begins with r for one who shares it with others, w for one who has it alone. In line all w
-- stand before all r. About each holder the hash has "fence length info"; `fence` is the last one.

--@ include holders

--@ include lock_line

local GONE = 3600000000 -- µs that it is remembered who has lost it
local holders, line, about, most = KEYS[1], KEYS[2], KEYS[3], nil
local gone = {} -- processes that did not take what they were handed, see first_in

-- When nobody saw the last leases end, what is known about their holders is still there.
local function sweep()
  if call('HLEN', about) > 1 and call('EXISTS', holders) == 0 then
    local fence = call('HGET', about, 'fence')
    call('DEL', about)
    call('HSET', about, 'fence', fence or '0')
  end
end

-- Leases that have ended are lost, and none may be longer than it is long: after a step of the
-- clock back. Who did not confirm what was handed over has lost nothing, and may ask again.
local function settle(now)
  for _, token in ipairs(call('ZRANGEBYSCORE', holders, '0', string.format('%d', now))) do
    if string.find(call('HGET', about, token) or '', '^%d+ %d+ $') then
      call('ZREM', holders, token)
      gone[process(token)] = true
    else
      call('ZADD', holders, string.format('%d', -(now + GONE)), token)
    end
    call('HDEL', about, token)
  end
  call('ZREMRANGEBYSCORE', holders, string.format('%d', -now), '0')
  local longest = call('ZRANGE', holders, -1, -1, 'WITHSCORES')
  if longest[2] then
    local length = string.match(call('HGET', about, longest[1]) or '', '^%d+ (%d+)')
    if length and longest[2] - now > tonumber(length) then
      for _, token in ipairs(call('ZRANGEBYSCORE', holders, after(now), '+inf')) do
        length = string.match(call('HGET', about, token) or '', '^%d+ (%d+)')
        if length then
          call('ZADD', holders, 'LT', string.format('%d', now + length), token)
        end
      end
    end
  end
end

local function room(token, now) -- whether there is room for it beside those who hold it now
  local held = count(holders, now)
  if held == 0 then
    return true
  elseif string.byte(token) == 119 then -- w
    return false
  end
  local first = call('ZRANGEBYSCORE', holders, after(now), '+inf', 'LIMIT', 0, 1)[1]
  return string.byte(first) ~= 119 and (most == 0 or held < most)
end

local function hold(token, micros, now, info)
  local fence = tonumber((string.match(call('HGET', about, token) or '', '^(%d+)')))
  if not fence then
    fence = math.max(now, (call('HGET', about, 'fence') or 0) + 1)
    call('HSET', about, 'fence', string.format('%d', fence))
  end
  call('HSET', about, token, string.format('%d %d %s', fence, micros, info))
  call('ZADD', holders, string.format('%d', now + micros), token)
  return fence
end

-- Hand it over to those in line for whom there is room; return whether `own` is among them.
local function admit(own, now)
  local mine, told, last = false, 0, nil
  if own then
    gone[process(own)] = nil
  end
  local entry = call('ZRANGE', line, 0, 0)[1]
  while entry do
    local token = string.match(entry, '^%S+')
    local free = room(token, now)
    if not free then
      -- There might be room for `own`, were it not for this one, who may be gone.
      local rest = own and room(own, now) and ends(holders, now, count(holders, now) - 1)
      if not rest or tell(entry, rest) then
        break
      end
    end
    call('ZREM', line, entry)
    if free and token == own then
      hold(token, CLAIM, now, '')
      mine = true
    elseif free and tell(entry, 0) and not gone[process(token)] then
      hold(token, CLAIM, now, '')
      told, last = told + 1, entry
    end
    entry = call('ZRANGE', line, 0, 0)[1]
  end
  if last then
    warn_others(line, told == 1 and last or nil, CLAIM)
  elseif entry and not own then -- what it waits for may have been handed over to who is stopped
    local rest = ends(holders, now, string.byte(entry) == 119 and count(holders, now) - 1 or 0)
    if rest <= CLAIM then
      tell(entry, rest)
    end
  end
  return mine
end

local function keep(now)
  call('PEXPIRE', about, string.format('%d', math.max(172800000, expire(holders, now) / 500)))
end
