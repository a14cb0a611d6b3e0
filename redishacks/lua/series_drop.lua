-- Drop what was taken away of a series and has been merged into another one.
--
-- EVALSHA sha n note moved [moved ...]  id
-- KEYS[1]  note: hash: which batch is under way; it may be another one by now
-- moved    buckets of the batch
-- Reply: 1

for i = 2, #KEYS do
  redis.call('UNLINK', KEYS[i])
end
if redis.call('HGET', KEYS[1], 'id') == ARGV[1] then
  redis.call('UNLINK', KEYS[1])
end
return 1
