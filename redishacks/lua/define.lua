-- Agree on how something is laid out: the first caller decides, later ones must say the same.
--
-- EVALSHA sha 1 meta  field value [field value ...]
-- KEYS[1]  meta: hash, no TTL: what it says outlives what is counted
-- Reply: {} all fields agree or were new and are stored; {field, stored} the first that differs,
--        and nothing was stored

local new = {}
for i = 1, #ARGV, 2 do
  local stored = redis.call('HGET', KEYS[1], ARGV[i])
  if not stored then
    new[#new + 1] = ARGV[i]
    new[#new + 1] = ARGV[i + 1]
  elseif stored ~= ARGV[i + 1] then
    return {ARGV[i], stored}
  end
end
-- Only what is new: a full server must not refuse a flush, which frees memory.
if #new > 0 then
  redis.call('HSET', KEYS[1], unpack(new))
end
return {}
