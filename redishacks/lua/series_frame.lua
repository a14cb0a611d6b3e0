-- How every script begins and ends that writes to series: included by them, they say only `change`.
--
-- EVALSHA sha n bucket [bucket ...] [fence]
--         sequence earliest latest now coarsest keep  {size expires count {entry} ...} ...
-- KEYS     what holds a bucket, or several, of one resolution; the last `coarsest` of them of the
--          coarsest. TTL until `expires`, set when the key is made
-- KEYS[last] when sequence is not '': the producer's fence: string, last sequence seen; TTL `keep` s
-- sequence  '' or a number that grows with every send of this producer
-- earliest, latest  µs since 1970: nothing is done before the one, or from the other on
-- now       '', or µs since 1970 for tests
-- size, entry  what the script says they are; expires: seconds since 1970, what has expired is left
--           out; count: how many entries follow
-- Reply: {1, now} applied; {0, now} this sequence was applied before; and nothing was done:
--        {-1, now} it is too early or too late, {-2, now, i, j} the j-th entry of the i-th key would
--        pass a limit, {-3, now, i} the i-th key is of the coarsest resolution, and has expired

local call, byte, sub, find, char = redis.call, string.byte, string.sub, string.find, string.char

-- What comes to a few bytes in the place of others: keys, from which byte on, and which.
local places = {}

-- change(key, at, count, size, expires, i, now, fence) looks at `count` entries of `words` words each,
-- from ARGV[at] on, for the i-th key. It returns a function that writes them, or nil if it has put
-- all into `places`; or false and which entry is refused.
local function run(words, change)
  local sequence, keys, fence = ARGV[1], #KEYS, nil
  if sequence ~= '' then
    fence, keys = KEYS[keys], keys - 1
  end
  local time = call('TIME')
  local now = tonumber(ARGV[4]) or time[1] * 1000000 + time[2]
  if fence then
    local last = call('GET', fence)
    if last and tonumber(sequence) <= tonumber(last) then
      return {0, now}
    end
  end
  if now < tonumber(ARGV[2]) or now >= tonumber(ARGV[3]) then
    return {-1, now}
  end
  -- Every check comes before the first write: scripts do not roll back.
  local writes, at, fine = {}, 7, keys - ARGV[5]
  for i = 1, keys do
    local expires, count = ARGV[at + 1], ARGV[at + 2] + 0
    if expires * 1000000 > now then
      local write, refused = change(KEYS[i], at + 3, count, ARGV[at] + 0, expires, i, now, fence)
      if write then
        writes[#writes + 1] = write
      elseif refused then
        return {-2, now, i, refused}
      end
    elseif i > fine then
      return {-3, now, i}
    end
    at = at + 3 + words * count
  end
  for i = 1, #places, 3 do
    call('SETRANGE', places[i], places[i + 1] - 1, places[i + 2])
  end
  for _, write in ipairs(writes) do
    write()
  end
  if fence then
    call('SET', fence, sequence, 'EX', ARGV[6])
  end
  return {1, now}
end
