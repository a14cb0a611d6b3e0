-- Add amounts to members in buckets that keep the heaviest: Misra and Gries' summary.
--
-- Call form and replies: series_frame.lua. KEYS: hashes, one bucket each: a field per member, its
--   count, and the field '' with three numbers: the sum of all amounts, what a count may lack, and
--   when the key was made, so that a key with the same field has not changed.
-- size  how many members are kept when there are more than twice as many: then every count is cut by
--   that of the next heaviest, and what comes to nothing is dropped
-- entry  member amount lack: amounts are positive integers, to 2^53 in all; a member of '' adds to
--   the sum alone, and `lack` is what counts that were cut elsewhere may lack

--@ include series_frame

local function prune(key, keep, total, lacks, born)
  local all, counts, members = call('HGETALL', key), {}, {}
  for i = 1, #all, 2 do
    if all[i] ~= '' then
      members[#members + 1] = all[i]
      counts[#counts + 1] = tonumber(all[i + 1])
    end
  end
  local sorted = {}
  for i = 1, #counts do
    sorted[i] = counts[i]
  end
  table.sort(sorted, function(a, b) return a > b end)
  local cut = sorted[keep + 1]
  for i, member in ipairs(members) do
    if counts[i] > cut then
      call('HINCRBY', key, member, string.format('-%.0f', cut))
    else
      call('HDEL', key, member)
    end
  end
  call('HSET', key, '', string.format('%.0f %.0f ', total, lacks + cut) .. born)
  return lacks + cut
end

return run(3, function(key, at, count, keep, expires, _, now)
  local head = call('HGET', key, '')
  local total, lacks, born = string.match(head or string.format('0 0 %.0f', now), '^(%d+) (%d+) (%d+)$')
  total, lacks = tonumber(total), tonumber(lacks)
  for j = 1, count do
    local first = at + 3 * (j - 1)
    total, lacks = total + ARGV[first + 1], lacks + ARGV[first + 2]
    if total >= 9007199254740992 then
      return false, j
    end
  end
  return function()
    call('HSET', key, '', string.format('%.0f %.0f ', total, lacks) .. born)
    local held = call('HLEN', key) - 1
    for first = at, at + 3 * (count - 1), 3 do
      local member, amount = ARGV[first], ARGV[first + 1]
      if member ~= '' and call('HINCRBY', key, member, amount) == amount + 0 then
        held = held + 1 -- it is new
      end
      if held > 2 * keep then -- at once: a hash that has grown never gets small again
        lacks = prune(key, keep, total, lacks, born)
        held = call('HLEN', key) - 1
      end
    end
    if not head then
      call('PEXPIREAT', key, expires .. '000')
    end
  end
end)
