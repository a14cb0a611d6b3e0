-- Add amounts to buckets of packed keys: all of them, or none.
--
-- Call form and replies: series_frame.lua. KEYS: packed keys, strings as series_packed.lua has them,
--   of 1, 2 or 4 bytes a value, the highest first; 8 bytes are a signed number.
-- size  bytes of the bitmap
-- entry  place amount: which bucket of the key, from 0, and an integer to 2^53

--@ include series_packed

local CODE = {'>I1', '>I2', nil, '>I4'}

local function widen(s, size, width)
  local old, parts = byte(s, 1), {char(width), sub(s, 2, 1 + size)}
  for i = 2 + size, #s, old do
    local value = decode(CODE[old], s, i)
    parts[#parts + 1] = width == 8 and encode('>i4I4', 0, value) or encode(CODE[width], value)
  end
  return table.concat(parts)
end

-- The key with an amount added, and what differs and where if that is all; nil if it passes 2^63.
local function add(s, size, place, amount)
  local cell, bit = bit_of(place)
  local bits, width = byte(s, cell), byte(s, 1)
  local there, grown = bits % (2 * bit) >= bit, false
  local at = rank(s, size, cell, bits, bit)
  local from, value = 2 + size + at * width, nil
  if width < 8 then
    local sum = (there and decode(CODE[width], s, from) or 0) + amount
    local needs = (sum < 0 or sum >= HALF) and 8 or sum >= 65536 and 4 or sum >= 256 and 2 or 1
    if needs > width then
      s, width, grown = widen(s, size, needs), needs, true
      from = 2 + size + at * width
    end
    value = width < 8 and encode(CODE[width], sum)
  end
  if width == 8 then
    local high, low = 0, 0
    if there then
      high, low = decode('>i4I4', s, from)
    end
    value = halves(high + math.floor(amount / HALF), low + amount % HALF)
    if not value then
      return nil
    end
  end
  return put(s, there, cell, bits, bit, from, value), there and not grown and from, value
end

return run(2, function(key, at, count, size, expires)
  local old = call('GET', key)
  local s, from, value = old or char(1) .. string.rep('\0', size), nil, nil
  for j = 1, count do
    s, from, value = add(s, size, tonumber(ARGV[at]), tonumber(ARGV[at + 1]))
    if not s then
      return nil, j
    end
    at = at + 2
  end
  return written(key, old, s, expires, count == 1 and from, value)
end)
