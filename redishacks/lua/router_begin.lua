-- Let a node take keys in a move, or go on with one whose version is another one by now.
--
-- EVALSHA sha 2 taken before
-- KEYS[1]  taken: set of names that were taken, with '' from here on; see router_take.lua
-- KEYS[2]  before: the same by the version that was before
-- Reply: 1

local call = redis.call
if call('EXISTS', KEYS[1]) == 0 then
  if call('EXISTS', KEYS[2]) == 1 then
    call('RENAME', KEYS[2], KEYS[1])
  else
    call('SADD', KEYS[1], '')
  end
end
return 1
