-- Drop what was set aside, for it was taken.
--
-- EVALSHA sha n given aside [aside ...]  key [key ...]
-- KEYS[1]  given: set of names that are aside; see router_give.lua
-- Reply: how many it were

local call = redis.call
local count, names = 0, {}
for i, key in ipairs(ARGV) do
  names[i] = '=' .. key
end
-- A call takes no more than 8,000 words that were unpacked.
for first = 1, #names, 1000 do
  local last = math.min(first + 999, #names)
  count = count + call('UNLINK', unpack(KEYS, first + 1, last + 1))
  call('SREM', KEYS[1], unpack(names, first, last))
end
return count
