-- Tell a node of a topology, unless it knows that version or a higher one.
--
-- EVALSHA sha 1 node  version stamp topology
-- KEYS[1]  node: hash: version, stamp, topology; no TTL: it says who has which keys
-- Reply: {stamp, topology} as they are stored now

local call = redis.call
if (tonumber(call('HGET', KEYS[1], 'version')) or 0) < tonumber(ARGV[1]) then
  call('HSET', KEYS[1], 'version', ARGV[1], 'stamp', ARGV[2], 'topology', ARGV[3])
end
return call('HMGET', KEYS[1], 'stamp', 'topology')
