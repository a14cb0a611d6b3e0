-- Many buckets in one string, for the scripts that write such: included by them.
--
-- byte 1: bytes of a value; then a bit per bucket that is set where it has a value, the first
-- bucket's is the highest; then the values of those that have one, in order.

--@ include struct
--@ include series_frame

local encode, decode = struct.pack, struct.unpack
local HALF = 4294967296

local function ones(b) -- bits that are set in a byte
  local count = 0
  while b > 0 do
    count = count + b % 2
    b = (b - b % 2) / 2
  end
  return count
end

-- Where a bucket's bit stands: its byte of the string, and that bit's value.
local function bit_of(place)
  return 2 + (place - place % 8) / 8, 2 ^ (7 - place % 8)
end

local ZEROS = string.rep('\0', 64)
local function last(s, size, cell, bits, bit) -- whether no bucket after this one has a value
  if bits % bit > 0 then
    return false
  end
  local left = 1 + size - cell
  return sub(s, cell + 1, 1 + size) == (left < 64 and sub(ZEROS, 1, left) or string.rep('\0', left))
end

local function rank(s, size, cell, bits, bit) -- how many values stand before a bucket's
  if last(s, size, cell, bits, bit) then -- most often
    return (#s - 1 - size) / byte(s, 1) - (bits % (2 * bit) >= bit and 1 or 0)
  end
  local count = ones(bits - bits % (2 * bit))
  for i = 2, cell - 1 do
    count = count + ones(byte(s, i))
  end
  return count
end

-- The string with a value put in the place of an old one, or between the others.
local function put(s, there, cell, bits, bit, from, value)
  if there then
    return sub(s, 1, from - 1) .. value .. sub(s, from + #value)
  end
  return sub(s, 1, cell - 1) .. char(bits + bit) .. sub(s, cell + 1, from - 1) .. value .. sub(s, from)
end

-- A sum of 64 bits in halves, for Lua's numbers are exact to 2^53 only; nil if it passes 2^63.
local function halves(high, low)
  if low >= HALF then
    high, low = high + 1, low - HALF
  end
  if high >= 2147483648 or high < -2147483648 then
    return nil
  end
  return encode('>i4I4', high, low)
end

-- The string without a bucket's value.
local function drop(s, cell, bits, bit, from)
  return sub(s, 1, cell - 1) .. char(bits - bit) .. sub(s, cell + 1, from - 1) .. sub(s, from + byte(s, 1))
end

local held = #KEYS < 5000 and call('MGET', unpack(KEYS)) or {}
-- The string of the i-th key; GET fails for what is none of ours.
local function get(i)
  return held[i] or call('GET', KEYS[i])
end

-- What writes a key's new string.
local function written(key, old, s, size, expires)
  return function()
    if #s == 1 + size then
      call('DEL', key)
    elseif old then
      call('SET', key, s, 'KEEPTTL')
    else
      call('SET', key, s, 'PXAT', expires .. '000')
    end
  end
end
