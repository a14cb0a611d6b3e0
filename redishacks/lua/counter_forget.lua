-- Forget where a counter's flush goes, unless a batch is on its way there.
--
-- EVALSHA sha 2 meta batches
-- KEYS[1]  meta: hash; no TTL
-- KEYS[2]  batches: sorted set of batches in flight; no TTL
-- Reply: 1 forgotten; 0 there are batches in flight and nothing was changed

if redis.call('ZCARD', KEYS[2]) > 0 then
  return 0
end
redis.call('HDEL', KEYS[1], 'destination')
return 1
