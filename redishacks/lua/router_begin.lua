-- Let a node give keys in a move, and take some.
--
-- EVALSHA sha 3 mover given taken  token
-- KEYS[1]  mover: string, who moves keys; see router_mover.lua
-- KEYS[2]  given: set, with the member '' from here on; see router_give.lua
-- KEYS[3]  taken: set, with the member '' from here on; see router_take.lua
-- Reply: 1; 0 when somebody else is the mover

local call = redis.call
if call('GET', KEYS[1]) ~= ARGV[1] then
  return 0
end
call('SADD', KEYS[2], '')
call('SADD', KEYS[3], '')
return 1
