-- Note members in buckets that count the distinct ones.
--
-- Call form and replies: series_frame.lua. KEYS: HyperLogLogs, one bucket each.
-- size  not used
-- entry  member

--@ include series_frame

return run(1, function(key, at, count, _, expires)
  local old = call('EXISTS', key) == 1
  local members = {unpack(ARGV, at, at + count - 1)}
  return function()
    call('PFADD', key, unpack(members))
    if not old then
      call('PEXPIREAT', key, at_once(expires))
    end
  end
end)
