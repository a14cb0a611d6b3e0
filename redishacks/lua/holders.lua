-- Included by scripts about several who hold something at once. Not a script by itself.
--
-- Holders are a sorted set: token -> µs since 1970 when its lease ends. A token that is gone for
-- good has a negative score: it gets nothing until -score.

local function after(time) -- `..` would round it
  return string.format('(%d', time)
end

local function count(holders, now)
  return redis.call('ZCOUNT', holders, after(now), '+inf')
end

local function ends(holders, now, first) -- µs until the lease ends that has `first` before it
  local found =
    redis.call('ZRANGEBYSCORE', holders, after(now), '+inf', 'WITHSCORES', 'LIMIT', first, 1)
  return found[2] and found[2] - now or 0
end

-- Let the key live for as long as there is something in it; return that time in µs.
local function expire(holders, now)
  local gone = redis.call('ZRANGE', holders, 0, 0, 'WITHSCORES')
  local last = redis.call('ZRANGE', holders, -1, -1, 'WITHSCORES')
  if last[2] then
    local rest = math.max(-gone[2], tonumber(last[2])) - now
    redis.call('PEXPIRE', holders, math.max(1, math.ceil(rest / 1000)))
    return rest
  end
  return 0
end
