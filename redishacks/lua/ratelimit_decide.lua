-- Decide on several limits at once: charge all of them, or none.
--
-- EVALSHA sha n key...  verb most  {algorithm amount a b cost [at]}...  [now]
-- KEYS[i]  state of the i-th limit: string; TTL until it says nothing any more
-- verb     hit     charge 1 to `most` units, as many as there is room for
--          try     the same, and a refusal is no refusal to a ban: the caller will come again
--          turn    charge one unit of a gcra, due within `most` µs
--          peek    charge nothing
--          charge  charge one unit, whatever room there is, as far as it can be counted
--          refund  give back what was charged at `at`, as far as it still counts
--          cancel  give back a turn; at: when no debt is left after it, if there are no later ones
--          note    `most` refusals were made without asking here
-- now      µs since 1970, for tests; else the server's own
--
-- Per limit, all integers; cost is that of one unit, or what is given back:
--   w  window  a: width of a bucket in µs, b: buckets before the newest one that count
--              width (1) newest bucket (6) total (7), counts, newest first, without trailing zeros
--   f  fixed   a: length of the window in µs, b: offset of its edges in µs
--              window (6) count (7)
--   g  gcra    amount: burst, a/b: µs per unit
--              µs (7) and fraction (7) of the time when no debt is left, µs (7) of the last change
--   l  log     a: length of the window in µs, b: µs per tick
--              base in µs (7), ticks since then, oldest first (4 each)
--   b  ban     amount: refusals, a: within µs, b: the first ban in µs, cost: the longest
--              end of the ban in µs (7), bans so far (1), beginning of the count in µs (7), count (7)
-- Reply: {now, units charged, then per limit: remaining, retry, next, reset}; units are 0 when refused;
--        retry: µs until it would be allowed, 0: now, -1: never; next: until a place comes back;
--        reset: until all have

--@ include struct

local floor, ceil, min, max = math.floor, math.ceil, math.min, math.max
local byte, rep, sub, unpack_, pack = string.byte, string.rep, string.sub, struct.unpack, struct.pack

local verb, most = ARGV[1], tonumber(ARGV[2])
local hitting = verb == 'hit' or verb == 'try'
local giving = verb == 'refund' or verb == 'cancel'
local fields = giving and 6 or 5
local now
if #ARGV > 2 + fields * #KEYS then
  now = tonumber(ARGV[#ARGV])
else
  local time = redis.call('TIME')
  now = time[1] * 1000000 + time[2]
end

-- What a state holds is exact below 2^53, and so are sums of two halves of that.
local MOST = 2 ^ 52

local function width_of(amount)
  return amount < 65536 and 2 or amount < 4294967296 and 4 or 7
end

-- Each algorithm: read the state into s; room(s): units of cost that fit; write(s): the state and µs
-- that it counts; charge(s, cost): the same, as it is then; refund(s, cost, at): the same, or nil; and
-- the figures of the reply. Where the clock went back, what was used counts from now on: s.moved.

local function window_algorithm()
  local window = {}

  function window.read(s, raw)
    local w, k = s.a, s.b
    s.index = floor(now / w)
    if not raw then
      s.width, s.total, s.body = width_of(s.amount), 0, ''
      s.format = '<I' .. s.width
      return
    end
    local newest
    s.width = byte(raw)
    s.format = '<I' .. s.width
    newest, s.total = unpack_('<I6I7', raw, 2)
    local body = sub(raw, 15)
    if s.index <= newest then
      s.body, s.moved = body, s.index < newest and s.total > 0
      return
    end
    local ahead, keep = s.index - newest, (k + 1) * s.width
    if ahead > k then
      s.total, s.body = 0, ''
      return
    end
    body = rep('\0', ahead * s.width) .. body
    if #body > keep then
      for at = keep + 1, #body, s.width do
        s.total = s.total - unpack_(s.format, body, at)
      end
      body = sub(body, 1, keep)
    end
    s.body = body
    window.trim(s)
  end

  function window.trim(s)
    local body, width = s.body, s.width
    if s.total == 0 then
      body = ''
    end
    while body ~= '' and unpack_(s.format, body, #body - width + 1) == 0 do
      body = sub(body, 1, -width - 1)
    end
    s.body = body
  end

  function window.room(s, cost)
    return floor((s.amount - s.total) / cost)
  end

  function window.write(s)
    local last = s.index + s.b + 1
    return pack('<BI6I7', s.width, s.index, s.total) .. s.body, last * s.a - now
  end

  function window.charge(s, cost)
    local wider = width_of(max(s.amount, s.total + cost))
    if wider > s.width then -- the limit was raised
      local counts = {}
      for at = 1, #s.body, s.width do
        counts[#counts + 1] = pack('<I' .. wider, (unpack_(s.format, s.body, at)))
      end
      s.body, s.width, s.format = table.concat(counts), wider, '<I' .. wider
    end
    local newest = s.body == '' and 0 or unpack_(s.format, s.body)
    s.body = pack(s.format, newest + cost) .. sub(s.body, s.width + 1)
    s.total = s.total + cost
    return window.write(s)
  end

  function window.refund(s, cost, at)
    local place = (s.index - floor(at / s.a)) * s.width + 1
    if place < 1 or place > #s.body then
      return
    end
    local count = unpack_(s.format, s.body, place)
    cost = min(cost, count)
    s.body = sub(s.body, 1, place - 1) .. pack(s.format, count - cost) .. sub(s.body, place + s.width)
    s.total = s.total - cost
    window.trim(s)
    return window.write(s)
  end

  function window.figures(s, cost)
    local w, k, n = s.a, s.b, #s.body / s.width
    if n == 0 then
      return s.amount, cost > s.amount and -1 or 0, 0, 0
    end
    local function leaves(place) -- the time at which a bucket stops counting
      return max(1, (s.index - place + 1 + k + 1) * w - now)
    end
    local retry, left, place = 0, s.total, n
    if cost > s.amount then
      retry = -1
    else
      while left + cost > s.amount do
        left = left - unpack_(s.format, s.body, (place - 1) * s.width + 1)
        retry = leaves(place)
        place = place - 1
      end
    end
    local newest = 1
    while unpack_(s.format, s.body, (newest - 1) * s.width + 1) == 0 do
      newest = newest + 1
    end
    return max(0, s.amount - s.total), retry, leaves(n), leaves(newest)
  end

  return window
end

local function fixed_algorithm()
  local fixed = {}

  function fixed.read(s, raw)
    s.index, s.count = floor((now - s.b) / s.a), 0
    if raw then
      local index, count = unpack_('<I6I7', raw)
      if index >= s.index then
        s.count, s.moved = count, index > s.index
      end
    end
  end

  function fixed.room(s, cost)
    return floor((s.amount - s.count) / cost)
  end

  function fixed.write(s)
    return pack('<I6I7', s.index, s.count), (s.index + 1) * s.a + s.b - now
  end

  function fixed.charge(s, cost)
    s.count = s.count + cost
    return fixed.write(s)
  end

  function fixed.refund(s, cost, at)
    if floor((at - s.b) / s.a) == s.index then
      s.count = max(0, s.count - cost)
      return fixed.write(s)
    end
  end

  function fixed.figures(s, cost)
    local rest = s.count > 0 and max(1, (s.index + 1) * s.a + s.b - now) or 0
    local retry = s.count + cost <= s.amount and 0 or cost > s.amount and -1 or rest
    return max(0, s.amount - s.count), retry, rest, rest
  end

  return fixed
end

local function gcra_algorithm()
  local gcra = {}

  function gcra.read(s, raw)
    s.debt = 0 -- in µs times b
    if raw then
      local time, fraction, changed = unpack_('<I7I7I7', raw)
      time, s.moved = time - max(0, changed - now), changed > now
      s.debt = min(MOST, max(0, (time - now) * s.b + min(fraction, s.b - 1)))
    end
  end

  function gcra.room(s, cost)
    return floor((s.amount * s.a - s.debt) / (cost * s.a))
  end

  function gcra.write(s)
    local micros = floor(s.debt / s.b)
    return pack('<I7I7I7', now + micros, s.debt - micros * s.b, now), micros + 1
  end

  function gcra.charge(s, cost)
    s.debt = min(MOST, s.debt + cost * s.a)
    return gcra.write(s)
  end

  function gcra.refund(s, cost, at)
    local back
    if verb == 'refund' then
      -- What has drained since may have been its own: right in whatever order refunds come.
      back = cost * s.a - max(0, now - at) * s.b
    elseif now + ceil(s.debt / s.b) == at then
      back = min(cost * s.a, (at - now) * s.b)
    end
    if back then
      s.debt = max(0, s.debt - max(0, back))
      return gcra.write(s)
    end
  end

  function gcra.figures(s, cost)
    local over = s.debt + (cost - s.amount) * s.a
    local retry = cost > s.amount and -1 or over > 0 and ceil(over / s.b) or 0
    local first = s.debt == 0 and 0 or (s.debt - 1) % s.a + 1
    local remaining = max(0, floor((s.amount * s.a - s.debt) / s.a))
    return remaining, retry, ceil(max(first, s.debt - (s.amount - 1) * s.a) / s.b), ceil(s.debt / s.b)
  end

  return gcra
end

local function log_algorithm()
  local log = {}

  function log.read(s, raw)
    s.base, s.body = now, ''
    if raw then
      s.base, s.body = unpack_('<I7', raw), sub(raw, 8)
      if #s.body > 0 then
        -- The newest hit is ahead by a tick at most, unless the clock went back.
        local ahead = s.base + unpack_('<I4', s.body, #s.body - 3) * s.b - now
        if ahead > s.b then
          s.base, s.moved = s.base - ahead, true
        end
      end
      local old, live = 0, #s.body / 4 + 1 -- a place that may be old, one that is not
      while live - old > 1 do
        local middle = floor((old + live) / 2)
        if log.leaves(s, middle) <= 0 then
          old = middle
        else
          live = middle
        end
      end
      s.body = sub(s.body, 4 * old + 1)
    end
    s.count = #s.body / 4
  end

  function log.leaves(s, place) -- µs until a hit stops counting
    return s.base + unpack_('<I4', s.body, 4 * place - 3) * s.b + s.a - now
  end

  function log.room(s, cost)
    return floor((s.amount - s.count) / cost)
  end

  function log.write(s)
    return pack('<I7', s.base) .. s.body, s.count > 0 and log.leaves(s, s.count) or 1
  end

  function log.charge(s, cost)
    local tick = 0
    if s.count == 0 then
      s.base = now
    else
      -- Rounded up: never counted for too short.
      tick = max(ceil((now - s.base) / s.b), (unpack_('<I4', s.body, #s.body - 3)))
      if tick > 4294967295 then
        local first = unpack_('<I4', s.body)
        local ticks = {}
        for place = 1, s.count do
          ticks[place] = pack('<I4', unpack_('<I4', s.body, 4 * place - 3) - first)
        end
        s.base, s.body, tick = s.base + first * s.b, table.concat(ticks), tick - first
      end
    end
    s.body = s.body .. rep(pack('<I4', tick), cost)
    s.count = s.count + cost
    return log.write(s)
  end

  function log.refund(s, cost, at)
    for place = s.count, 1, -1 do
      local time = s.base + unpack_('<I4', s.body, 4 * place - 3) * s.b
      if cost == 0 or time < at then
        break
      elseif time - at < s.b then
        s.body = sub(s.body, 1, 4 * place - 4) .. sub(s.body, 4 * place + 1)
        s.count, cost = s.count - 1, cost - 1
      end
    end
    return log.write(s)
  end

  function log.figures(s, cost)
    if s.count == 0 then
      return s.amount, cost > s.amount and -1 or 0, 0, 0
    end
    local over = s.count + cost - s.amount
    local retry = cost > s.amount and -1 or over > 0 and log.leaves(s, over) or 0
    return max(0, s.amount - s.count), retry, log.leaves(s, 1), log.leaves(s, s.count)
  end

  return log
end

local function ban_algorithm()
  local ban = {}

  function ban.read(s, raw)
    s.till, s.bans, s.since, s.count = 0, 0, now, 0
    if raw then
      s.till, s.bans, s.since, s.count = unpack_('<I7BI7I7', raw)
      if s.till > now + s.cost or s.since > now then
        s.till, s.since, s.moved = min(s.till, now + s.cost), min(s.since, now), true
      end
    end
  end

  function ban.room(s)
    return now < s.till and 0 or most
  end

  function ban.write(s)
    -- What it learned is forgotten as long after a ban as the longest one lasts.
    local counts = max(s.since + s.a, s.bans > 0 and s.till + s.cost or 0) - now
    return pack('<I7BI7I7', s.till, s.bans, s.since, s.count), counts
  end

  function ban.note(s, refusals)
    if now - s.since >= s.a then
      s.since, s.count = now, 0
    end
    s.count = s.count + refusals
    if s.count >= s.amount then
      s.till = now + min(s.cost, s.b * 2 ^ min(s.bans, 40))
      s.bans, s.count = min(255, s.bans + 1), 0
    end
    return ban.write(s)
  end

  function ban.figures(s)
    local rest = max(0, s.till - now)
    return rest > 0 and 0 or s.amount - s.count, rest, rest, rest
  end

  return ban
end

local makers = {w = window_algorithm, f = fixed_algorithm, g = gcra_algorithm, l = log_algorithm,
  b = ban_algorithm}
local made = {}

local function save(s, state, counts)
  if state then
    redis.call('SET', s.key, state, 'PX', max(1, ceil(counts / 1000)))
  end
end

local states, units = {}, verb == 'hit' and most or 1
for i = 1, #KEYS do
  local at = 3 + (i - 1) * fields
  local letter = ARGV[at]
  -- Made when it is used: a function costs a tenth of a microsecond in every call of a script.
  made[letter] = made[letter] or makers[letter]()
  local s = {
    key = KEYS[i], letter = letter, algorithm = made[letter], amount = tonumber(ARGV[at + 1]),
    a = tonumber(ARGV[at + 2]), b = tonumber(ARGV[at + 3]), cost = tonumber(ARGV[at + 4]),
    at = tonumber(ARGV[at + 5]),
  }
  s.raw = redis.call('GET', s.key)
  s.algorithm.read(s, s.raw)
  states[i] = s
  if hitting then
    units = min(units, s.algorithm.room(s, s.cost))
  elseif verb == 'charge' and s.letter ~= 'b' then
    -- A log can remember no more hits than its limit, anything else no more than is exact.
    local most_ = s.letter == 'l' and s.amount - s.count or MOST - (s.total or s.count or 0)
    s.cost = max(0, min(s.cost, most_))
  end
end

local charged = hitting and max(0, units) or verb == 'charge' and 1 or 0
if verb == 'turn' then
  local _, due = states[1].algorithm.figures(states[1], states[1].cost)
  charged = due >= 0 and due <= most and 1 or 0
  for _, s in ipairs(states) do
    charged = s.letter == 'b' and now < s.till and 0 or charged
  end
end

local reply = {now, charged}
for i, s in ipairs(states) do
  local algorithm, cost, due, _ = s.algorithm, s.cost
  if charged > 0 and s.letter ~= 'b' then
    if verb == 'turn' then
      _, due = algorithm.figures(s, cost)
    end
    cost = 0
    save(s, algorithm.charge(s, s.cost * charged))
  elseif giving and s.raw and s.letter ~= 'b' then
    cost = 0
    save(s, algorithm.refund(s, s.cost, s.at))
  elseif s.letter == 'b' and now >= s.till
    and (verb == 'note' or verb == 'hit' and charged == 0) then
    save(s, algorithm.note(s, verb == 'note' and most or 1))
  elseif s.moved then
    save(s, algorithm.write(s))
  end
  local remaining, retry, next_, reset = algorithm.figures(s, cost)
  if charged == 0 and s.raw and redis.call('PTTL', s.key) == -1 then
    redis.call('PEXPIRE', s.key, max(1, ceil(reset / 1000)))
  end
  local n = #reply
  reply[n + 1], reply[n + 2], reply[n + 3], reply[n + 4] = remaining, due or retry, next_, reset
end
return reply
