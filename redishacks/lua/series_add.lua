-- Add amounts to buckets of packed keys: all of them, or none.
--
-- Call form and replies: series_frame.lua. KEYS: packed keys, strings as series_packed.lua has them,
--   of 1, 2 or 4 bytes a value, the highest first; 8 bytes are a signed number.
-- size  bytes of the bitmap
-- entry  place amount: which bucket of the key, from 0, and an integer to 2^53; with a "!" behind it
--   a bucket that comes to 0 has no value any more

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

-- The key with an amount added; nil if it passes 2^63.
local function add(s, size, place, amount, clears)
  local cell, bit = bit_of(place)
  local bits, width = byte(s, cell), byte(s, 1)
  local there = bits % (2 * bit) >= bit
  local at = rank(s, size, cell, bits, bit)
  local from, value = 2 + size + at * width, nil
  if width < 8 then
    local sum = (there and decode(CODE[width], s, from) or 0) + amount
    if clears and sum == 0 then
      return there and drop(s, cell, bits, bit, from) or s
    end
    local needs = (sum < 0 or sum >= HALF) and 8 or sum >= 65536 and 4 or sum >= 256 and 2 or 1
    if needs > width then
      s, width = widen(s, size, needs), needs
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
    elseif clears and value == '\0\0\0\0\0\0\0\0' then
      return there and drop(s, cell, bits, bit, from) or s
    end
  end
  return put(s, there, cell, bits, bit, from, value)
end

-- The usual hit, of now: its bucket is the last one with a value, and needs no more bytes for it.
-- Returns from where on the key differs, and what is there then; nil if it is not so.
local function usual(s, size, place, amount)
  local width, cell, bit = byte(s, 1), bit_of(place)
  local bits = byte(s, cell)
  if width == 8 or bits % (2 * bit) < bit or not last(s, size, cell, bits, bit) then
    return nil
  end
  local from = #s - width + 1
  local sum = amount + (width == 1 and byte(s, from) or decode(CODE[width], s, from))
  if sum < 0 or sum >= 256 ^ width then
    return nil
  end
  return from, width == 1 and char(sum) or encode(CODE[width], sum)
end

return run(2, function(key, at, count, size, expires, i)
  local old = get(i)
  if old and count == 1 and sub(ARGV[at + 1], -1) ~= '!' then
    local from, value = usual(old, size, ARGV[at] + 0, ARGV[at + 1] + 0)
    if from then
      local n = #places
      places[n + 1], places[n + 2], places[n + 3] = key, from, value
      return
    end
  end
  local s = old or char(1) .. string.rep('\0', size)
  for j = 1, count do
    local amount, clears = ARGV[at + 1], false
    if sub(amount, -1) == '!' then
      amount, clears = sub(amount, 1, -2), true
    end
    s = add(s, size, ARGV[at] + 0, amount + 0, clears)
    if not s then
      return false, j
    end
    at = at + 2
  end
  return written(key, old, s, size, expires)
end)
