-- Put buckets in the place of others, and remove some, unless somebody has written meanwhile.
--
-- EVALSHA sha n bucket [bucket ...]  latest {expected expires count part [part ...]} ...
-- KEYS     buckets that are replaced, one for each group of ARGV, and then those that are removed:
--          strings, or hashes with a field '' that every write changes
-- latest   µs since 1970: nothing is done from then on
-- expected  SHA-1 of the string, or the field ''; '' when there is no such key
-- count, part  1 for a string, the field and the value of each for a hash, none to remove it. TTL
--          until `expires`, seconds since 1970. A count of -1 leaves it as it is
-- Reply: 1 done, 0 somebody has written, or it is too late: nothing was done

local call = redis.call
local time = call('TIME')
if time[1] * 1000000 + time[2] >= tonumber(ARGV[1]) then
  return 0
end
local at, groups = 2, {}
while ARGV[at] do
  local key, expected, count = KEYS[#groups + 1], ARGV[at], tonumber(ARGV[at + 2])
  local kind, found = call('TYPE', key).ok, ''
  if kind == 'hash' then
    found = call('HGET', key, '')
  elseif kind ~= 'none' then
    found = redis.sha1hex(call('GET', key))
  end
  if found ~= expected then
    return 0
  end
  groups[#groups + 1] = at
  at = at + 3 + math.max(count, 0)
end
for i, key in ipairs(KEYS) do
  if not groups[i] or ARGV[groups[i] + 2] ~= '-1' then
    call('UNLINK', key)
  end
end
for i, first in ipairs(groups) do
  local count = tonumber(ARGV[first + 2])
  if count == 1 then
    call('SET', KEYS[i], ARGV[first + 3])
  elseif count > 1 then
    for field = first + 3, first + 2 + count, 2 do
      call('HSET', KEYS[i], ARGV[field], ARGV[field + 1])
    end
  end
  if count > 0 then
    call('PEXPIREAT', KEYS[i], ARGV[first + 1] .. '000')
  end
end
return 1
