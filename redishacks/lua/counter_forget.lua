-- Forget where a counter's flush goes, unless a batch is on its way there.
--
-- EVALSHA sha 2 meta batches  [batch ...]
-- KEYS[1]  meta: hash; no TTL
-- KEYS[2]  batches: sorted set of batches in flight; no TTL
-- ARGV     batches in flight that the ledger to come knows already
-- Reply: 1 forgotten; 0 there are other batches in flight and nothing was changed

local known = {}
for _, batch in ipairs(ARGV) do
  known[batch] = true
end
for _, batch in ipairs(redis.call('ZRANGE', KEYS[2], 0, -1)) do
  if not known[batch] then
    return 0
  end
end
redis.call('HDEL', KEYS[1], 'destination', 'ledger')
return 1
