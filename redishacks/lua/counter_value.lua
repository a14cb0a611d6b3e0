-- Read everything Redis holds of one id, at one moment.
--
-- EVALSHA sha n next batches pending... {batch claimed...}...  id columns expected [batch ...]
-- KEYS[1]    next: string; no TTL
-- KEYS[2]    batches: sorted set of batches in flight; no TTL
-- KEYS[3..]  the pending sorted set of each column; then for every batch in flight its hash and
--            its sorted set of each column; no TTL
-- ARGV[1]    the id
-- ARGV[2]    number of columns
-- ARGV[3..]  the value of next, '' for none, and the batches in flight for which the keys were made
-- Reply: {} they have changed, look again; else {pending amount of each column, then for every
--        batch: chunk that holds the id or nil, amount of each column}; amounts are strings or nil

local columns = tonumber(ARGV[2])
if (redis.call('GET', KEYS[1]) or '') ~= ARGV[3] then
  return {}
end
local batches = redis.call('ZRANGE', KEYS[2], 0, -1)
if #batches ~= #ARGV - 3 then
  return {}
end
for i, batch in ipairs(batches) do
  if batch ~= ARGV[i + 3] then
    return {}
  end
end

local reply, n = {}, 0
local function add(value)
  n = n + 1
  reply[n] = value
end
for c = 1, columns do
  add(redis.call('ZSCORE', KEYS[2 + c], ARGV[1]))
end
local at = 2 + columns
for _ = 1, #batches do
  local rank = redis.call('ZRANK', KEYS[at + 2], ARGV[1])
  local chunk = tonumber(redis.call('HGET', KEYS[at + 1], 'chunk'))
  add(rank and chunk and math.floor(rank / chunk))
  for c = 1, columns do
    add(redis.call('ZSCORE', KEYS[at + 1 + c], ARGV[1]))
  end
  at = at + 1 + columns
end
return reply
