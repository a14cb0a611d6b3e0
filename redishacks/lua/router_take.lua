-- Make keys of what another node had of them, each one once in a move.
--
-- EVALSHA sha n mover taken key [key ...]  token dump pttl [dump pttl ...]
-- KEYS[1]  mover: string, who moves keys; see router_mover.lua
-- KEYS[2]  taken: set of all names that were taken, after a '='; no TTL: it is dropped when nobody
--          can take any more. With the member '' from the move's begin on
-- token    '' or who asks as the mover
-- dump     '' for a key that has ended meanwhile
-- Reply: 1 done; 0 this node has lost what it knew of the move, or somebody else is the mover

local call = redis.call
if ARGV[1] ~= '' and call('GET', KEYS[1]) ~= ARGV[1] then
  return 0
end
if call('SISMEMBER', KEYS[2], '') == 0 then
  return 0
end
for i = 3, #KEYS do
  local key, dump, pttl = KEYS[i], ARGV[2 * i - 4], tonumber(ARGV[2 * i - 3])
  local taken = '=' .. key
  if call('SADD', KEYS[2], taken) == 1 and dump ~= '' then
    local done = redis.pcall('RESTORE', key, pttl < 0 and 0 or math.max(pttl, 1), dump, 'REPLACE')
    if done.err then
      call('SREM', KEYS[2], taken)
      return done
    end
  end
end
return 1
