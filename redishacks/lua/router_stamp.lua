-- Tell a node of a topology, unless it knows that version or a higher one.
--
-- EVALSHA sha 2 node mover  version stamp topology token
-- KEYS[1]  node: hash: version, stamp, topology; no TTL: it says who has which keys
-- KEYS[2]  mover: string, who moves keys; see router_mover.lua
-- token    '' or who says so as the mover
-- Reply: {stamp, topology} as they are stored now; {} when somebody else is the mover

local call = redis.call
if ARGV[4] ~= '' and call('GET', KEYS[2]) ~= ARGV[4] then
  return {}
end
if (tonumber(call('HGET', KEYS[1], 'version')) or 0) < tonumber(ARGV[1]) then
  call('HSET', KEYS[1], 'version', ARGV[1], 'stamp', ARGV[2], 'topology', ARGV[3])
end
return call('HMGET', KEYS[1], 'stamp', 'topology')
