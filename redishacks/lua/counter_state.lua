-- Look at one partition; with a candidate, make sure that its next batch has a name.
--
-- EVALSHA sha 5 meta since next batches index  candidate
-- KEYS[1]    meta: hash; no TTL
-- KEYS[2]    since: string, µs of the oldest hit not yet claimed; no TTL
-- KEYS[3]    next: string, the id that the next claimed batch will have; no TTL: a reader that saw
--            it can tell from SQL whether what it read as pending was applied meanwhile
-- KEYS[4]    batches: sorted set, id of each batch in flight -> µs of its claim; no TTL
-- KEYS[5]    index: sorted set, the pending amounts of the first column; no TTL
-- ARGV[1]    what to name the next batch when it has no name; '' to change nothing
-- Reply: {next or '', since or '', ids pending, µs of the last acknowledgement or '',
--         destination or '', ledger or '', now in µs, batch, claimed, batch, claimed, ...}

-- Asked first: a full server refuses a SET that would change nothing, too.
if ARGV[1] ~= '' and redis.call('EXISTS', KEYS[3]) == 0 then
  redis.call('SET', KEYS[3], ARGV[1])
end
local now = redis.call('TIME')
local reply = {
  redis.call('GET', KEYS[3]) or '',
  redis.call('GET', KEYS[2]) or '',
  redis.call('ZCARD', KEYS[5]),
  redis.call('HGET', KEYS[1], 'flushed') or '',
  redis.call('HGET', KEYS[1], 'destination') or '',
  redis.call('HGET', KEYS[1], 'ledger') or '',
  string.format('%d%06d', now[1], now[2]),
}
for _, item in ipairs(redis.call('ZRANGE', KEYS[4], 0, -1, 'WITHSCORES')) do
  reply[#reply + 1] = item
end
return reply
