-- Note members in buckets that count the distinct ones.
--
-- Call form and replies: series_frame.lua. KEYS: HyperLogLogs, one bucket each.
-- size  not used
-- entry  member whole: with whole = '1' it is a HyperLogLog, all of whose members are meant; then
--   there must be a fence, whose key holds it for as long as the script runs

--@ include series_frame

return run(2, function(key, at, count, _, expires, _, _, fence)
  local old = call('EXISTS', key) == 1
  return function()
    for first = at, at + 2 * (count - 1), 2 do
      if ARGV[first + 1] == '1' then
        call('SET', fence, ARGV[first])
        call('PFMERGE', key, fence)
      else
        call('PFADD', key, ARGV[first])
      end
    end
    if not old then
      call('PEXPIREAT', key, expires .. '000')
    end
  end
end)
