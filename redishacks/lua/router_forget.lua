-- Drop what was set aside, for it was taken.
--
-- EVALSHA sha n given aside [aside ...]  key [key ...]
-- KEYS[1]  given: set of names that are aside; see router_give.lua
-- Reply: how many it were

local call = redis.call
local count = 0
-- One by one: a call takes no more than 8,000 words that were unpacked.
for i, key in ipairs(ARGV) do
  count = count + call('UNLINK', KEYS[i + 1])
  call('SREM', KEYS[1], '=' .. key)
end
return count
