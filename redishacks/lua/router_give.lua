-- Set keys aside on the node that had them, and return what they hold: the same to every asker.
--
-- EVALSHA sha n mover given key aside [key aside ...]  token most
-- KEYS[1]  mover: string, who moves keys; see router_mover.lua
-- KEYS[2]  given: set of all names that are aside, after a '='; no TTL: it is dropped when the move
--          has ended. With the member '' from the move's begin on
-- key      of any type; what is there becomes `aside`, with its TTL, until it was taken
-- token    '' or who asks as the mover
-- most     bytes after which the keys that are left are not looked at; '' for no limit
-- Reply: {dump, pttl, ...} of each; false and -2 for none; '' and 0 for one that has ended since it
--        was set aside, which must be taken too: somebody may still have what it was.
--        {} when this node has lost what it knew of the move, or somebody else is the mover

local call = redis.call
if ARGV[1] ~= '' and call('GET', KEYS[1]) ~= ARGV[1] then
  return {}
end
if call('SISMEMBER', KEYS[2], '') == 0 then
  return {}
end
local most = tonumber(ARGV[2]) or math.huge
local found, size = {}, 0
for i = 3, #KEYS, 2 do
  local key, aside = KEYS[i], KEYS[i + 1]
  -- An error when there is no such key; 0 when one is aside already.
  if redis.pcall('RENAMENX', key, aside) == 1 then
    call('SADD', KEYS[2], '=' .. key)
  end
  local dump, pttl = call('DUMP', aside), call('PTTL', aside)
  if not dump and call('SISMEMBER', KEYS[2], '=' .. key) == 1 then
    dump, pttl = '', 0
  end
  found[i - 2] = dump
  found[i - 1] = pttl
  size = size + #(dump or '')
  if size >= most then
    break
  end
end
return found
