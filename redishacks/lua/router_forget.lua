-- Drop what was set aside, for it was taken.
--
-- EVALSHA sha n given aside [aside ...]  key [key ...]
-- KEYS[1]  given: set of names that are aside; see router_give.lua
-- Reply: how many it were

local count = redis.call('UNLINK', unpack(KEYS, 2))
redis.call('SREM', KEYS[1], unpack(ARGV))
return count
