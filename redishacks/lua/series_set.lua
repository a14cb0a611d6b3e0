-- Note gauges in buckets of packed keys: the last value, the least, the most, their sum and number.
--
-- Call form and replies: series_frame.lua. KEYS: packed keys, strings as series_packed.lua has them,
--   of 48 bytes a value: six signed numbers of 8 bytes, the highest byte first: the last value and
--   when it was, in µs since 1970; the least; the most; the sum; how many there were
-- size  bytes of the bitmap
-- entry  place last when least most sum.high sum.low many: which bucket of the key, from 0; `when`
--   may be '' for now; integers to 2^53, and sum.low to 2^32

--@ include series_packed

local WIDTH = 48

return run(8, function(key, at, count, size, expires, i, now)
  local old = get(i)
  local s = old or char(WIDTH) .. string.rep('\0', size)
  for j = 1, count do
    local last, when = tonumber(ARGV[at + 1]), tonumber(ARGV[at + 2]) or now
    local least, most = tonumber(ARGV[at + 3]), tonumber(ARGV[at + 4])
    local high, low = tonumber(ARGV[at + 5]), tonumber(ARGV[at + 6])
    local many = tonumber(ARGV[at + 7])
    local cell, bit = bit_of(tonumber(ARGV[at]))
    local bits = byte(s, cell)
    local there = bits % (2 * bit) >= bit
    local from = 2 + size + rank(s, size, cell, bits, bit) * WIDTH
    if there then
      local last0, when0, least0, most0, high0, low0, many0 = decode('>i8i8i8i8i4I4i8', s, from)
      if when0 > when then
        last, when = last0, when0
      end
      least, most = math.min(least, least0), math.max(most, most0)
      high, low, many = high + high0, low + low0, many + many0
    end
    local sum = halves(high, low)
    if not sum then
      return false, j
    end
    local value = encode('>i8i8i8i8', last, when, least, most) .. sum .. encode('>i8', many)
    if there and count == 1 then
      local n = #places
      places[n + 1], places[n + 2], places[n + 3] = key, from, value
      return
    end
    s = put(s, there, cell, bits, bit, from, value)
    at = at + 8
  end
  return written(key, old, s, size, expires)
end)
