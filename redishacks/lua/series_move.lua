-- Take all buckets of a series away, to merge them into another one.
--
-- EVALSHA sha n note deletes from to [from to ...]  id target ttl latest
-- KEYS[1]  note: hash: id, target; says that this is under way; TTL `ttl` s
-- KEYS[2]  deletes: fence of who deletes from it: string, TTL 24 h
-- from, to  buckets of the series, which need not be there, and where they go; TTLs stay
-- latest    µs since 1970: nothing is done from then on
-- Reply: {id, target} of what is under way now: of an earlier call, if one has not come to its end;
--        nil when it is too late

local call = redis.call
local old = call('HMGET', KEYS[1], 'id', 'target')
if old[1] then
  return old
end
local time = call('TIME')
if time[1] * 1000000 + time[2] >= tonumber(ARGV[4]) then
  return false
end
-- Who is subtracting what was here must see that it is gone.
call('INCR', KEYS[2])
call('EXPIRE', KEYS[2], 86400)
for i = 3, #KEYS, 2 do
  if call('EXISTS', KEYS[i]) == 1 then
    call('RENAME', KEYS[i], KEYS[i + 1])
  end
end
call('HSET', KEYS[1], 'id', ARGV[1], 'target', ARGV[2])
call('EXPIRE', KEYS[1], ARGV[3])
return {ARGV[1], ARGV[2]}
