-- Forget where a counter's flush goes, unless a batch is on its way there.
--
-- EVALSHA sha n meta batches batch...  destination ledger [batch ...]
-- KEYS[1]   meta: hash; no TTL
-- KEYS[2]   batches: sorted set of batches in flight; no TTL
-- KEYS[3..] the hash of each batch; no TTL
-- ARGV[1]   where the batches go from now on
-- ARGV[2]   which ledger is there
-- ARGV[3..] batches in flight that this ledger knows already
-- Reply: 1 forgotten; 0 there are other batches in flight and nothing was changed

local place = {}
for i = 3, #ARGV do
  place[ARGV[i]] = i
end
local batches = redis.call('ZRANGE', KEYS[2], 0, -1)
for _, batch in ipairs(batches) do
  if not place[batch] then
    return 0
  end
end
redis.call('HDEL', KEYS[1], 'destination', 'ledger')
for _, batch in ipairs(batches) do
  redis.call('HSET', KEYS[place[batch]], 'destination', ARGV[1], 'ledger', ARGV[2])
end
return 1
