-- Add amounts to buckets of packed keys: all of them, or none.
--
-- EVALSHA sha n packed [packed ...] [fence]
--         sequence earliest latest now coarsest  {bitmap expires count {place amount} ...} ...
-- KEYS     packed keys, the last `coarsest` of them of the coarsest resolution: string, bytes per
--          value, a bit per bucket, then the values of those that have one, the highest byte
--          first; 8 bytes are a signed number. TTL until `expires`, set when the key is made
-- KEYS[last] when sequence is not '': the producer's fence: string, last sequence seen; TTL 24 h
-- sequence  '' or a number that grows with every send of this producer
-- earliest, latest  µs since 1970: nothing is done before the one, or from the other on
-- now       '', or µs since 1970 for tests
-- bitmap    bytes of the bitmap; expires: seconds since 1970, what has expired is left out; count:
--           how many places follow, from 0; amounts are integers to 2^53
-- Reply: {1, now} applied; {0, now} this sequence was applied before; and nothing was done:
--        {-1, now} it is too early or too late, {-2, now, i, j} the j-th place of the i-th key would
--        pass 2^63, {-3, now, i} the i-th key is of the coarsest resolution, and has expired

local call, byte, sub, find, char = redis.call, string.byte, string.sub, string.find, string.char
local encode, decode = struct.pack, struct.unpack
local CODE = {'>I1', '>I2', nil, '>I4'}
local HALF = 4294967296

local sequence, keys = ARGV[1], #KEYS
if sequence ~= '' then
  keys = keys - 1
end
local time = call('TIME')
local now = tonumber(ARGV[4]) or time[1] * 1000000 + time[2]
if sequence ~= '' then
  local last = call('GET', KEYS[#KEYS])
  if last and tonumber(sequence) <= tonumber(last) then
    return {0, now}
  end
end
if now < tonumber(ARGV[2]) or now >= tonumber(ARGV[3]) then
  return {-1, now}
end

local function ones(b) -- bits that are set in a byte
  local count = 0
  while b > 0 do
    count = count + b % 2
    b = (b - b % 2) / 2
  end
  return count
end

local function rank(s, cell, size, bits, bit) -- how many values stand before a place
  local later = find(s, '[^%z]', cell + 1)
  if bits % bit == 0 and not (later and later <= 1 + size) then
    return (#s - 1 - size) / byte(s, 1) - (bits % (2 * bit) >= bit and 1 or 0)
  end
  local count = ones(bits - bits % (2 * bit))
  for i = 2, cell - 1 do
    count = count + ones(byte(s, i))
  end
  return count
end

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
  local cell, bit = 2 + (place - place % 8) / 8, 2 ^ (7 - place % 8)
  local bits, width = byte(s, cell), byte(s, 1)
  local there, grown = bits % (2 * bit) >= bit, false
  local at = rank(s, cell, size, bits, bit)
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
  if width == 8 then -- in halves, for Lua's numbers are exact to 2^53 only
    local high, low = 0, 0
    if there then
      high, low = decode('>i4I4', s, from)
    end
    low = low + amount % HALF
    high = high + math.floor(amount / HALF)
    if low >= HALF then
      high, low = high + 1, low - HALF
    end
    if high >= 2147483648 or high < -2147483648 then
      return nil
    end
    value = encode('>i4I4', high, low)
  end
  if there then
    s = sub(s, 1, from - 1) .. value .. sub(s, from + width)
    return s, not grown and from - 1, value
  end
  return sub(s, 1, cell - 1) .. char(bits + bit) .. sub(s, cell + 1, from - 1) .. value .. sub(s, from)
end

-- Every check comes before the first write: scripts do not roll back.
local writes, at, fine = {}, 6, keys - ARGV[5]
for i = 1, keys do
  local size, expires, count = tonumber(ARGV[at]), tonumber(ARGV[at + 1]), tonumber(ARGV[at + 2])
  at = at + 3
  if expires * 1000000 > now then
    local old = call('GET', KEYS[i])
    local s, from, value = old or char(1) .. string.rep('\0', size), nil, nil
    for j = 1, count do
      s, from, value = add(s, size, tonumber(ARGV[at]), tonumber(ARGV[at + 1]))
      if not s then
        return {-2, now, i, j}
      end
      at = at + 2
    end
    if old and from and count == 1 then
      writes[#writes + 1] = {'SETRANGE', KEYS[i], from, value}
    elseif old then
      writes[#writes + 1] = {'SET', KEYS[i], s, 'KEEPTTL'}
    else
      writes[#writes + 1] = {'SET', KEYS[i], s, 'PXAT', string.format('%d000', expires)}
    end
  elseif i > fine then
    return {-3, now, i}
  else
    at = at + 2 * count
  end
end
for _, write in ipairs(writes) do
  call(unpack(write))
end
if sequence ~= '' then
  call('SET', KEYS[#KEYS], sequence, 'EX', 86400)
end
return {1, now}
