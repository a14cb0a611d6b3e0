-- Hit windows only: the short way of ratelimit_decide, with the same states and the same reply.
--
-- EVALSHA sha n key...  most  {amount a b cost}...  [now]
-- KEYS[i]  state of the i-th window: string; TTL until it says nothing any more
--          width (1) newest bucket (6) total (7), counts, newest first, without trailing zeros
-- most     charge 1 to so many units of every window's cost, as many as there is room for
-- a, b     width of a bucket in µs, buckets before the newest one that count
-- now      µs since 1970, for tests; else the server's own
-- Reply: {now, units charged, then per window: remaining, retry, next, reset}, as ratelimit_decide

--@ include struct

local keys, args, call = KEYS, ARGV, redis.call
local unpack_, pack, sub, floor, max = struct.unpack, struct.pack, string.sub, math.floor, math.max
local HEAD = 14

local units, now = tonumber(args[1]), tonumber(args[2 + 4 * #keys])
if not now then
  local time = call('TIME')
  now = time[1] * 1000000 + time[2]
end

-- One format each: gluing it together would cost as much as packing by it.
local function of_count(width)
  return width == 2 and '<I2' or width == 4 and '<I4' or '<I7'
end

local function of_head_and_count(width)
  return width == 2 and '<BI6I7I2' or width == 4 and '<BI6I7I4' or '<BI6I7I7'
end

-- Per window, from place 6i - 5 on: newest bucket, width, total, count of the newest, the others,
-- and whether the clock went back: then all of it counts from now on
local states = {}
for i = 1, #keys do
  local at, last = 4 * i - 2, 6 * i - 6
  local amount, keep = args[at] + 0, args[at + 2] + 1
  local wanted = amount < 65536 and 2 or amount < 4294967296 and 4 or 7
  local index, width, total, count, others = floor(now / args[at + 1]), wanted, 0, 0, ''
  local raw, moved = call('GET', keys[i]), false
  if raw then
    local newest
    width, newest, total = unpack_('<BI6I7', raw)
    local format, ahead = of_count(width), index - newest
    if ahead <= 0 then
      moved = ahead < 0
      if #raw > HEAD then
        count, others = unpack_(format, raw, HEAD + 1), sub(raw, HEAD + 1 + width)
      end
    elseif ahead < keep then
      local ends = HEAD + (keep - ahead) * width -- with the oldest bucket that still counts
      if #raw > ends then
        for place = ends + 1, #raw, width do
          total = total - unpack_(format, raw, place)
        end
        while ends > HEAD and unpack_(format, raw, ends + 1 - width) == 0 do
          ends = ends - width
        end
      end
      if total > 0 then
        others = string.rep('\0', (ahead - 1) * width) .. sub(raw, HEAD + 1, ends)
      end
    else
      total = 0
    end
    if width < wanted then -- the limit was raised
      local counts = {}
      for place = 1, #others, width do
        counts[#counts + 1] = pack(of_count(wanted), (unpack_(format, others, place)))
      end
      width, others = wanted, table.concat(counts)
    end
  end
  units = max(0, math.min(units, floor((amount - total) / args[at + 3])))
  states[last + 1], states[last + 2], states[last + 3] = index, width, total
  states[last + 4], states[last + 5], states[last + 6] = count, others, moved
end

local reply = {now, units}
for i = 1, #keys do
  local at = 4 * i - 2
  local amount, w, cost = args[at] + 0, args[at + 1] + 0, args[at + 3] + 0
  local index, width, total, count, others, moved = unpack(states, 6 * i - 5, 6 * i)
  local left = (index + args[at + 2] + 1) * w - now -- µs until the newest bucket stops counting
  local oldest, retry, next_, reset = #others / width, 0, 0, 0 -- places after the newest
  if units > 0 or (moved and total > 0) then
    total, count = total + cost * units, count + cost * units
    local head = pack(of_head_and_count(width), width, index, total, count)
    call('SET', keys[i], head .. others, 'PX', math.ceil(left / 1000))
  end
  if units > 0 then
    next_, reset = left - oldest * w, left
  else
    if cost > amount then
      retry = -1
    end
    if total > 0 then
      local counts, format = pack(of_count(width), count) .. others, of_count(width)
      local rest, place, newest = total, oldest, 0
      while retry >= 0 and rest + cost > amount do
        rest = rest - unpack_(format, counts, place * width + 1)
        retry = left - place * w
        place = place - 1
      end
      while unpack_(format, counts, newest * width + 1) == 0 do
        newest = newest + 1
      end
      next_, reset = left - oldest * w, left - newest * w
    end
    if call('PTTL', keys[i]) == -1 then
      call('PEXPIRE', keys[i], max(1, math.ceil(reset / 1000)))
    end
  end
  reply[at + 1], reply[at + 2], reply[at + 3], reply[at + 4] = max(0, amount - total), retry, next_, reset
end
return reply
