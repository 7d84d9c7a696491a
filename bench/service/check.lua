-- For wrk: each response must be 200 with the body that is given. The last line says what came out.
--   wrk ... --script check.lua URL -- BODY

local threads = {}

function setup(thread)
   table.insert(threads, thread)
end

function init(args)
   expected = args[1]
   wrong = 0
end

function response(status, headers, body)
   if status ~= 200 or body ~= expected then
      wrong = wrong + 1
   end
end

function done(summary, latency, requests)
   local errors = summary.errors
   local count = errors.connect + errors.read + errors.write + errors.timeout
   for _, thread in ipairs(threads) do
      count = count + thread:get("wrong")
   end
   io.write(string.format(
      '{"requests": %d, "microseconds": %d, "errors": %d, "median": %d, "p99": %d}\n',
      summary.requests, summary.duration, count,
      latency:percentile(50), latency:percentile(99)))
end
