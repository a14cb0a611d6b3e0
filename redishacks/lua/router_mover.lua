-- Become the one who moves keys, on one node, go on being it, or be it no more.
--
-- EVALSHA sha 1 mover  token ttl how
-- KEYS[1]  mover: string: the token; TTL `ttl` ms, renewed by whoever goes on
-- ttl      0 to give it up
-- how      'force' to take it from another one, 'renew' only if it is this one's
-- Reply: {1, token} done; {0, token, ms} it is that one's, for so long if it does nothing;
--        {0, '', 0} it is nobody's

local call = redis.call
local other = call('GET', KEYS[1])
if other and other ~= ARGV[1] and ARGV[3] ~= 'force' then
  return {0, other, call('PTTL', KEYS[1])}
end
if ARGV[2] == '0' then
  call('UNLINK', KEYS[1])
elseif ARGV[3] == 'renew' and not other then
  return {0, '', 0}
else
  call('SET', KEYS[1], ARGV[1], 'PX', ARGV[2])
end
return {1, ARGV[1]}
