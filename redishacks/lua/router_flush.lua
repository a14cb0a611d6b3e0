-- Drop all keys of a node but those by which it knows what it is.
--
-- EVALSHA sha n key [key ...]
-- KEYS     what stays, of any type
-- Reply: OK

local call = redis.call
local kept = {}
for i, key in ipairs(KEYS) do
  kept[i] = {call('DUMP', key), call('PTTL', key)}
end
call('FLUSHDB')
for i, key in ipairs(KEYS) do
  local dump, pttl = kept[i][1], kept[i][2]
  if dump then
    call('RESTORE', key, math.max(pttl, 0), dump)
  end
end
return redis.status_reply('OK')
